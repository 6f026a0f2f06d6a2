// Vectors of float and double: the only file with intrinsics.
//
// One source, three instruction sets: AVX-512 (16 floats), AVX2 + FMA + F16C (8 floats), and plain
// (16 bytes of the compiler's own vectors: SSE2, NEON). A library is built for exactly one of them,
// that of AVX-512 with or without BF16 (DLK_BF16: products of pairs of bf16).
//   Vec<T>           T = float, double: arithmetic, fma, max, min, select, horizontal sums
//   load, store      T, and float from and to bf16 and f16 (round to nearest even); in full, or the
//                    first n lanes (1 ≤ n ≤ size), touching no byte beyond them
//   load_double      D::size numbers of float or double as Vec<double>; store_rounded is its
//                    inverse
//   to_doubles       a vector as the one or two of double that hold its lanes in order
//   load_pieces      16 bytes from each of the places p, p + stride, …; store_pieces is its inverse
//   transpose_pieces the small square matrices that the same piece of several vectors makes
//   bits_of, mask_of a comparison's result as a bit for each lane, and its inverse
//   exp, log, tanh   ≤ 2 ulp (tests/test_simd.py), algorithms of Cephes (Moshier, 1992); exp and
//                    tanh of an array take its vectors side by side
// max(a, b) and min(a, b) are a > b ? a : b and a < b ? a : b: where either is NaN they return b.
// exceeds(a, b), for a running maximum b, is a > b or a is NaN: the last NaN stays.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(DLKERNELS_SIMD_PLAIN) || !defined(__AVX2__)
#define DLK_PLAIN 1
#include <torch/headeronly/util/Half.h>
#elif defined(__AVX512F__)
#define DLK_AVX512 1
#if defined(__AVX512BF16__)
#define DLK_BF16 1
#endif
#include <immintrin.h>
#else
#define DLK_AVX2 1
#include <immintrin.h>
#endif

namespace dlkernels {

// Between two looks at memory that another thread is about to write.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type in which an op computes on elements stored as S.
template <typename S>
using accumulate_t = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float to_float(bf16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

template <typename S>
S from_float(float value);

template <>
inline bf16 from_float<bf16>(float value) {
  if (std::isnan(value)) return {0x7fc0};
  const uint32_t bits = bit_cast<uint32_t>(value);
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

#if DLK_PLAIN
inline float to_float(f16 value) { return c10::detail::fp16_ieee_to_fp32_value(value.bits); }
template <>
inline f16 from_float<f16>(float value) {
  return {c10::detail::fp16_ieee_from_fp32_value(value)};
}
#else
inline float to_float(f16 value) { return _cvtsh_ss(value.bits); }
template <>
inline f16 from_float<f16>(float value) {
  return {uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
}
#endif

// One element, S -> accumulate_t<S> and back.
template <typename S>
inline accumulate_t<S> widen(S value) {
  if constexpr (std::is_same_v<S, accumulate_t<S>>)
    return value;
  else
    return to_float(value);
}
template <typename S>
inline S narrow(accumulate_t<S> value) {
  if constexpr (std::is_same_v<S, accumulate_t<S>>)
    return value;
  else
    return from_float<S>(value);
}

template <typename T>
struct Vec;

// ----------------------------------------------------------------------------------------- AVX-512
#if DLK_AVX512

template <>
struct Vec<float> {
  static constexpr int64_t size = 16;
  using Mask = __mmask16;
  __m512 v;
  Vec() = default;
  Vec(__m512 value) : v(value) {}
  Vec(float value) : v(_mm512_set1_ps(value)) {}
};
template <>
struct Vec<double> {
  static constexpr int64_t size = 8;
  using Mask = __mmask8;
  __m512d v;
  Vec() = default;
  Vec(__m512d value) : v(value) {}
  Vec(double value) : v(_mm512_set1_pd(value)) {}
};
using F = Vec<float>;
using D = Vec<double>;

inline F operator+(F a, F b) { return _mm512_add_ps(a.v, b.v); }
inline F operator-(F a, F b) { return _mm512_sub_ps(a.v, b.v); }
inline F operator*(F a, F b) { return _mm512_mul_ps(a.v, b.v); }
inline F operator/(F a, F b) { return _mm512_div_ps(a.v, b.v); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline F max(F a, F b) { return _mm512_max_ps(a.v, b.v); }
inline F min(F a, F b) { return _mm512_min_ps(a.v, b.v); }
inline F abs(F a) { return _mm512_abs_ps(a.v); }
inline Vec<float>::Mask less(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Vec<float>::Mask exceeds(F a, F b) {
  return less(b, a) | _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
}
inline F select(Vec<float>::Mask mask, F yes, F no) {
  return _mm512_mask_blend_ps(mask, no.v, yes.v);
}
inline F copysign(F magnitude, F sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return _mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v));
}
inline F exponent_from_low_bits(F a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23));
}
inline void split_exponent(F x, F& mantissa, F& exponent) {
  const __m512i bits = _mm512_castps_si512(x.v);
  exponent =
      _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(bits, 23), _mm512_set1_epi32(126)));
  mantissa = _mm512_castsi512_ps(_mm512_or_si512(
      _mm512_and_si512(bits, _mm512_set1_epi32(0x007fffff)), _mm512_set1_epi32(0x3f000000)));
}
inline float sum(F a) { return _mm512_reduce_add_ps(a.v); }
inline float max_element(F a) { return _mm512_reduce_max_ps(a.v); }

inline D operator+(D a, D b) { return _mm512_add_pd(a.v, b.v); }
inline D operator-(D a, D b) { return _mm512_sub_pd(a.v, b.v); }
inline D operator*(D a, D b) { return _mm512_mul_pd(a.v, b.v); }
inline D operator/(D a, D b) { return _mm512_div_pd(a.v, b.v); }
inline D fma(D a, D b, D c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
inline D max(D a, D b) { return _mm512_max_pd(a.v, b.v); }
inline D min(D a, D b) { return _mm512_min_pd(a.v, b.v); }
inline D abs(D a) { return _mm512_abs_pd(a.v); }
inline Vec<double>::Mask less(D a, D b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ); }
inline Vec<double>::Mask exceeds(D a, D b) {
  return less(b, a) | _mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q);
}
inline D select(Vec<double>::Mask mask, D yes, D no) {
  return _mm512_mask_blend_pd(mask, no.v, yes.v);
}
inline D copysign(D magnitude, D sign) {
  const __m512d bit = _mm512_set1_pd(-0.0);
  return _mm512_or_pd(_mm512_andnot_pd(bit, magnitude.v), _mm512_and_pd(bit, sign.v));
}
inline D exponent_from_low_bits(D a) {
  return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(a.v), 52));
}
inline void split_exponent(D x, D& mantissa, D& exponent) {
  const __m512i bits = _mm512_castpd_si512(x.v);
  exponent =
      _mm512_cvtepi64_pd(_mm512_sub_epi64(_mm512_srli_epi64(bits, 52), _mm512_set1_epi64(1022)));
  mantissa = _mm512_castsi512_pd(
      _mm512_or_si512(_mm512_and_si512(bits, _mm512_set1_epi64(0x000fffffffffffff)),
                      _mm512_set1_epi64(0x3fe0000000000000)));
}
inline double sum(D a) { return _mm512_reduce_add_pd(a.v); }
inline double max_element(D a) { return _mm512_reduce_max_pd(a.v); }

inline __mmask16 first_lanes(int64_t n) { return __mmask16((1u << n) - 1); }
inline Vec<float>::Mask first_lanes(F, int64_t n) { return first_lanes(n); }
inline Vec<double>::Mask first_lanes(D, int64_t n) { return __mmask8(first_lanes(n)); }
inline uint32_t bits_of(F, Vec<float>::Mask mask) { return mask; }
inline uint32_t bits_of(D, Vec<double>::Mask mask) { return mask; }
inline Vec<float>::Mask mask_of(F, uint32_t bits) { return __mmask16(bits); }
inline Vec<double>::Mask mask_of(D, uint32_t bits) { return __mmask8(bits); }

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline void store_first(float* p, F a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }

inline D load(const double* p) { return _mm512_loadu_pd(p); }
inline D load_first(const double* p, int64_t n) {
  return _mm512_maskz_loadu_pd(__mmask8(first_lanes(n)), p);
}
inline void store(double* p, D a) { _mm512_storeu_pd(p, a.v); }
inline void store_first(double* p, D a, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8(first_lanes(n)), a.v);
}

inline F load_pieces(const float* p, int64_t stride) {
  F a = _mm512_castps128_ps512(_mm_loadu_ps(p));
  a = _mm512_insertf32x4(a.v, _mm_loadu_ps(p + stride), 1);
  a = _mm512_insertf32x4(a.v, _mm_loadu_ps(p + 2 * stride), 2);
  return _mm512_insertf32x4(a.v, _mm_loadu_ps(p + 3 * stride), 3);
}
inline void store_pieces(float* p, int64_t stride, F a) {
  _mm_storeu_ps(p, _mm512_castps512_ps128(a.v));
  _mm_storeu_ps(p + stride, _mm512_extractf32x4_ps(a.v, 1));
  _mm_storeu_ps(p + 2 * stride, _mm512_extractf32x4_ps(a.v, 2));
  _mm_storeu_ps(p + 3 * stride, _mm512_extractf32x4_ps(a.v, 3));
}
inline D load_pieces(const double* p, int64_t stride) {
  D a = _mm512_castpd128_pd512(_mm_loadu_pd(p));
  a = _mm512_insertf64x2(a.v, _mm_loadu_pd(p + stride), 1);
  a = _mm512_insertf64x2(a.v, _mm_loadu_pd(p + 2 * stride), 2);
  return _mm512_insertf64x2(a.v, _mm_loadu_pd(p + 3 * stride), 3);
}
inline void store_pieces(double* p, int64_t stride, D a) {
  _mm_storeu_pd(p, _mm512_castpd512_pd128(a.v));
  _mm_storeu_pd(p + stride, _mm512_extractf64x2_pd(a.v, 1));
  _mm_storeu_pd(p + 2 * stride, _mm512_extractf64x2_pd(a.v, 2));
  _mm_storeu_pd(p + 3 * stride, _mm512_extractf64x2_pd(a.v, 3));
}

inline D load_double(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline void store_rounded(float* p, D a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a.v)); }
inline void to_doubles(F a, D (&halves)[2]) {
  halves[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  halves[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
}

inline F widen(bf16, __m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline F widen(f16, __m256i bits) { return _mm512_cvtph_ps(bits); }
inline __m256i narrow(bf16, F a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), _mm512_set1_epi32(0x7fc0)));
}
inline __m256i narrow(f16, F a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

template <typename S, typename = std::enable_if_t<sizeof(S) == 2>>
inline F load(const S* p) {
  return widen(S{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <typename S, typename = std::enable_if_t<sizeof(S) == 2>>
inline F load_first(const S* p, int64_t n) {
  return widen(S{}, _mm256_maskz_loadu_epi16(first_lanes(n), p));
}
template <typename S, typename = std::enable_if_t<sizeof(S) == 2>>
inline void store(S* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(S{}, a));
}
template <typename S, typename = std::enable_if_t<sizeof(S) == 2>>
inline void store_first(S* p, F a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(S{}, a));
}

#if DLK_BF16
// Pairs of bf16 as floats, the first in the low half.
inline F load_bits(const bf16* p, int64_t n) {  // n bf16, then zeros
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(uint32_t((uint64_t(1) << n) - 1), p));
}
inline F interleave(const bf16* low, const bf16* high, int64_t n) {  // high may be null, for zeros
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), low));
  if (!high) return _mm512_castsi512_ps(a);
  const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), high));
  return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}
// sum + a.low·b.low + a.high·b.high; results below 2^-126 are 0.
inline F add_products(F a, F b, F sum) {
  return _mm512_dpbf16_ps(sum.v, __m512bh(a.v), __m512bh(b.v));
}
#endif

// -------------------------------------------------------------------------------------------- AVX2
#elif DLK_AVX2

template <>
struct Vec<float> {
  static constexpr int64_t size = 8;
  using Mask = __m256;
  __m256 v;
  Vec() = default;
  Vec(__m256 value) : v(value) {}
  Vec(float value) : v(_mm256_set1_ps(value)) {}
};
template <>
struct Vec<double> {
  static constexpr int64_t size = 4;
  using Mask = __m256d;
  __m256d v;
  Vec() = default;
  Vec(__m256d value) : v(value) {}
  Vec(double value) : v(_mm256_set1_pd(value)) {}
};
using F = Vec<float>;
using D = Vec<double>;

inline F operator+(F a, F b) { return _mm256_add_ps(a.v, b.v); }
inline F operator-(F a, F b) { return _mm256_sub_ps(a.v, b.v); }
inline F operator*(F a, F b) { return _mm256_mul_ps(a.v, b.v); }
inline F operator/(F a, F b) { return _mm256_div_ps(a.v, b.v); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline F max(F a, F b) { return _mm256_max_ps(a.v, b.v); }
inline F min(F a, F b) { return _mm256_min_ps(a.v, b.v); }
inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
inline Vec<float>::Mask less(F a, F b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
inline Vec<float>::Mask exceeds(F a, F b) {
  return _mm256_or_ps(less(b, a), _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
}
inline F select(Vec<float>::Mask mask, F yes, F no) { return _mm256_blendv_ps(no.v, yes.v, mask); }
inline F copysign(F magnitude, F sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v));
}
inline F exponent_from_low_bits(F a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23));
}
inline void split_exponent(F x, F& mantissa, F& exponent) {
  const __m256i bits = _mm256_castps_si256(x.v);
  exponent =
      _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(126)));
  mantissa = _mm256_castsi256_ps(_mm256_or_si256(
      _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff)), _mm256_set1_epi32(0x3f000000)));
}
inline float sum(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max_element(F a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline D operator+(D a, D b) { return _mm256_add_pd(a.v, b.v); }
inline D operator-(D a, D b) { return _mm256_sub_pd(a.v, b.v); }
inline D operator*(D a, D b) { return _mm256_mul_pd(a.v, b.v); }
inline D operator/(D a, D b) { return _mm256_div_pd(a.v, b.v); }
inline D fma(D a, D b, D c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
inline D max(D a, D b) { return _mm256_max_pd(a.v, b.v); }
inline D min(D a, D b) { return _mm256_min_pd(a.v, b.v); }
inline D abs(D a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v); }
inline Vec<double>::Mask less(D a, D b) { return _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ); }
inline Vec<double>::Mask exceeds(D a, D b) {
  return _mm256_or_pd(less(b, a), _mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q));
}
inline D select(Vec<double>::Mask mask, D yes, D no) { return _mm256_blendv_pd(no.v, yes.v, mask); }
inline D copysign(D magnitude, D sign) {
  const __m256d bit = _mm256_set1_pd(-0.0);
  return _mm256_or_pd(_mm256_andnot_pd(bit, magnitude.v), _mm256_and_pd(bit, sign.v));
}
inline D exponent_from_low_bits(D a) {
  return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(a.v), 52));
}
inline void split_exponent(D x, D& mantissa, D& exponent) {
  const __m256i bits = _mm256_castpd_si256(x.v);
  // 2^52 + e as bits, less 2^52 + 1022: a 64-bit integer to double without AVX-512.
  const __m256i biased =
      _mm256_or_si256(_mm256_srli_epi64(bits, 52), _mm256_set1_epi64x(0x4330000000000000));
  exponent = _mm256_sub_pd(_mm256_castsi256_pd(biased), _mm256_set1_pd(0x1p52 + 1022));
  mantissa = _mm256_castsi256_pd(
      _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi64x(0x000fffffffffffff)),
                      _mm256_set1_epi64x(0x3fe0000000000000)));
}
inline double sum(D a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
inline double max_element(D a) {
  const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
}

inline F load_pieces(const float* p, int64_t stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
inline void store_pieces(float* p, int64_t stride, F a) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(a.v));
  _mm_storeu_ps(p + stride, _mm256_extractf128_ps(a.v, 1));
}
inline D load_pieces(const double* p, int64_t stride) {
  return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p)), _mm_loadu_pd(p + stride), 1);
}
inline void store_pieces(double* p, int64_t stride, D a) {
  _mm_storeu_pd(p, _mm256_castpd256_pd128(a.v));
  _mm_storeu_pd(p + stride, _mm256_extractf128_pd(a.v, 1));
}

inline D load_double(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline void store_rounded(float* p, D a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a.v)); }
inline void to_doubles(F a, D (&halves)[2]) {
  halves[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v));
  halves[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
}

// The first n of 8 numbers of 16 bits: AVX2 has no mask for these, and a memcpy of n bytes is a
// call. From 4 on, two overlapping words of 8 bytes.
inline __m128i load_first16(const void* from, int64_t n) {
  const char* p = static_cast<const char*>(from);
  uint64_t low = 0, high = 0;
  if (n >= 4) {
    std::memcpy(&low, p, 8);
    if (n > 4) {
      std::memcpy(&high, p + 2 * (n - 4), 8);
      high >>= 16 * (8 - n);
    }
  } else {
    if (n & 1) {
      uint16_t last;
      std::memcpy(&last, p + 2 * (n - 1), 2);
      low = uint64_t(last) << (16 * (n - 1));
    }
    if (n & 2) {
      uint32_t pair;
      std::memcpy(&pair, p, 4);
      low |= pair;
    }
  }
  return _mm_set_epi64x(int64_t(high), int64_t(low));
}
inline void store_first16(void* to, __m128i bits, int64_t n) {
  char* p = static_cast<char*>(to);
  const uint64_t low = uint64_t(_mm_cvtsi128_si64(bits));
  const uint64_t high = uint64_t(_mm_extract_epi64(bits, 1));
  if (n >= 4) {
    if (n > 4) {
      const uint64_t last = (n == 8 ? 0 : low >> (16 * (n - 4))) | high << (16 * (8 - n));
      std::memcpy(p + 2 * (n - 4), &last, 8);
    }
    std::memcpy(p, &low, 8);
  } else {
    if (n & 2) std::memcpy(p, &low, 4);
    if (n & 1) {
      const uint64_t last = low >> (16 * (n - 1));
      std::memcpy(p + 2 * (n - 1), &last, 2);
    }
  }
}

// A window over ones followed by zeros is the mask of the first n lanes.
alignas(64) inline constexpr int32_t kLanes32[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                     0,  0,  0,  0,  0,  0,  0,  0};
alignas(64) inline constexpr int64_t kLanes64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
inline __m256i first_lanes32(int64_t n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanes32 + 8 - n));
}
inline __m256i first_lanes64(int64_t n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanes64 + 4 - n));
}

inline Vec<float>::Mask first_lanes(F, int64_t n) { return _mm256_castsi256_ps(first_lanes32(n)); }
inline Vec<double>::Mask first_lanes(D, int64_t n) { return _mm256_castsi256_pd(first_lanes64(n)); }
inline uint32_t bits_of(F, Vec<float>::Mask mask) { return uint32_t(_mm256_movemask_ps(mask)); }
inline uint32_t bits_of(D, Vec<double>::Mask mask) { return uint32_t(_mm256_movemask_pd(mask)); }
inline Vec<float>::Mask mask_of(F, uint32_t bits) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits)), lanes);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lanes));
}
inline Vec<double>::Mask mask_of(D, uint32_t bits) {
  const __m256i lanes = _mm256_setr_epi64x(1, 2, 4, 8);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(int64_t(bits)), lanes);
  return _mm256_castsi256_pd(_mm256_cmpeq_epi64(set, lanes));
}

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes32(n)); }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline void store_first(float* p, F a, int64_t n) { _mm256_maskstore_ps(p, first_lanes32(n), a.v); }

inline D load(const double* p) { return _mm256_loadu_pd(p); }
inline D load_first(const double* p, int64_t n) { return _mm256_maskload_pd(p, first_lanes64(n)); }
inline void store(double* p, D a) { _mm256_storeu_pd(p, a.v); }
inline void store_first(double* p, D a, int64_t n) {
  _mm256_maskstore_pd(p, first_lanes64(n), a.v);
}

inline F widen(bf16, __m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline F widen(f16, __m128i bits) { return _mm256_cvtph_ps(bits); }
inline __m128i narrow(bf16, F a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high =
      _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrow(f16, F a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

template <typename S, typename = std::enable_if_t<sizeof(S) == 2>>
inline F load(const S* p) {
  return widen(S{}, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <typename S, typename = std::enable_if_t<sizeof(S) == 2>>
inline F load_first(const S* p, int64_t n) {
  return widen(S{}, load_first16(p, n));
}
template <typename S, typename = std::enable_if_t<sizeof(S) == 2>>
inline void store(S* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(S{}, a));
}
template <typename S, typename = std::enable_if_t<sizeof(S) == 2>>
inline void store_first(S* p, F a, int64_t n) {
  store_first16(p, narrow(S{}, a), n);
}

// ------------------------------------------------------------------------------------------- plain
#else

// The compiler's vectors of 16 bytes; a comparison yields integers of the same width, 0 or -1.
typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
typedef int64_t Longs __attribute__((vector_size(16)));

template <typename T, typename NativeVector, typename MaskVector>
struct PlainVec {
  using Native = NativeVector;
  using Mask = MaskVector;
  static constexpr int64_t size = 16 / sizeof(T);
  Native v;
  PlainVec() = default;
  PlainVec(Native value) : v(value) {}
  PlainVec(T value) : v(value - Native{}) {}
};
template <>
struct Vec<float> : PlainVec<float, Floats, Integers> {
  using PlainVec::PlainVec;
};
template <>
struct Vec<double> : PlainVec<double, Doubles, Longs> {
  using PlainVec::PlainVec;
};
using F = Vec<float>;
using D = Vec<double>;

template <typename T>
inline Vec<T> select(typename Vec<T>::Mask mask, Vec<T> yes, Vec<T> no) {
  using Mask = typename Vec<T>::Mask;
  return bit_cast<typename Vec<T>::Native>(
      Mask((mask & bit_cast<Mask>(yes.v)) | (~mask & bit_cast<Mask>(no.v))));
}

#define DLK_PLAIN_OPERATIONS(V, T)                                                             \
  inline V operator+(V a, V b) { return V::Native(a.v + b.v); }                                \
  inline V operator-(V a, V b) { return V::Native(a.v - b.v); }                                \
  inline V operator*(V a, V b) { return V::Native(a.v * b.v); }                                \
  inline V operator/(V a, V b) { return V::Native(a.v / b.v); }                                \
  inline V fma(V a, V b, V c) { return V::Native(a.v * b.v + c.v); }                           \
  inline V::Mask less(V a, V b) { return V::Mask(a.v < b.v); }                                 \
  inline V::Mask exceeds(V a, V b) { return V::Mask((a.v > b.v) | (a.v != a.v)); }             \
  inline V max(V a, V b) { return select<T>(V::Mask(a.v > b.v), a, b); }                       \
  inline V min(V a, V b) { return select<T>(V::Mask(a.v < b.v), a, b); }                       \
  inline V copysign(V magnitude, V sign) {                                                     \
    const V::Mask bit = bit_cast<V::Mask>(V(T(-0.0)).v);                                       \
    return bit_cast<V::Native>(                                                                \
        V::Mask((~bit & bit_cast<V::Mask>(magnitude.v)) | (bit & bit_cast<V::Mask>(sign.v)))); \
  }                                                                                            \
  inline V abs(V a) { return copysign(a, V(T(0))); }                                           \
  inline T sum(V a) {                                                                          \
    T total = a.v[0];                                                                          \
    for (int64_t i = 1; i < V::size; ++i) total += a.v[i];                                     \
    return total;                                                                              \
  }                                                                                            \
  inline T max_element(V a) {                                                                  \
    T best = a.v[0];                                                                           \
    for (int64_t i = 1; i < V::size; ++i) best = best > a.v[i] ? best : a.v[i];                \
    return best;                                                                               \
  }
DLK_PLAIN_OPERATIONS(F, float)
DLK_PLAIN_OPERATIONS(D, double)
#undef DLK_PLAIN_OPERATIONS

inline F exponent_from_low_bits(F a) {
  return bit_cast<F::Native>(F::Mask(bit_cast<F::Mask>(a.v) << 23));
}
inline D exponent_from_low_bits(D a) {
  return bit_cast<D::Native>(D::Mask(bit_cast<D::Mask>(a.v) << 52));
}
inline void split_exponent(F x, F& mantissa, F& exponent) {
  const F::Mask bits = bit_cast<F::Mask>(x.v);
  exponent = F(__builtin_convertvector((bits >> 23) - 126, F::Native));
  mantissa = bit_cast<F::Native>(F::Mask((bits & 0x007fffff) | 0x3f000000));
}
inline void split_exponent(D x, D& mantissa, D& exponent) {
  const D::Mask bits = bit_cast<D::Mask>(x.v);
  exponent = D(__builtin_convertvector((bits >> 52) - 1022, D::Native));
  mantissa = bit_cast<D::Native>(D::Mask((bits & 0x000fffffffffffff) | 0x3fe0000000000000));
}

template <typename T>
inline typename Vec<T>::Mask first_lanes(Vec<T>, int64_t n) {
  typename Vec<T>::Mask mask{};
  for (int64_t i = 0; i < n; ++i) mask[i] = -1;
  return mask;
}

template <typename T>
inline uint32_t bits_of(Vec<T>, typename Vec<T>::Mask mask) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < Vec<T>::size; ++i) bits |= uint32_t(mask[i] != 0) << i;
  return bits;
}
template <typename T>
inline typename Vec<T>::Mask mask_of(Vec<T>, uint32_t bits) {
  typename Vec<T>::Mask mask{};
  for (int64_t i = 0; i < Vec<T>::size; ++i) mask[i] = (bits >> i & 1) ? -1 : 0;
  return mask;
}

template <typename S>
inline Vec<accumulate_t<S>> load_first(const S* p, int64_t n) {
  typename Vec<accumulate_t<S>>::Native v{};
  for (int64_t i = 0; i < n; ++i) v[i] = widen(p[i]);
  return v;
}
template <typename S>
inline Vec<accumulate_t<S>> load(const S* p) {
  return load_first(p, Vec<accumulate_t<S>>::size);
}
template <typename S>
inline void store_first(S* p, Vec<accumulate_t<S>> a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = narrow<S>(a.v[i]);
}
template <typename S>
inline void store(S* p, Vec<accumulate_t<S>> a) {
  store_first(p, a, Vec<accumulate_t<S>>::size);
}

// A vector of 16 bytes is one piece.
template <typename T>
inline Vec<T> load_pieces(const T* p, int64_t) {
  return load(p);
}
template <typename T>
inline void store_pieces(T* p, int64_t, Vec<T> a) {
  store(p, a);
}

inline D load_double(const float* p) {
  D::Native v{};
  for (int64_t i = 0; i < D::size; ++i) v[i] = double(p[i]);
  return v;
}
inline void store_rounded(float* p, D a) {
  for (int64_t i = 0; i < D::size; ++i) p[i] = float(a.v[i]);
}
inline void to_doubles(F a, D (&halves)[2]) {
  for (D& half : halves) {
    D::Native v{};
    for (int64_t i = 0; i < D::size; ++i) v[i] = double(a.v[(&half - halves) * D::size + i]);
    half = v;
  }
}

#endif

inline D load_double(const double* p) { return load(p); }
inline void store_rounded(double* p, D a) { store(p, a); }
inline void to_doubles(D a, D (&whole)[1]) { whole[0] = a; }

// ------------------------------------------------------------------------ functions, for every set

// Lanes of a (0 … n−1) and b (n … 2n−1) in the order of `lane`.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DLK_SHUFFLEVECTOR 1
#endif
#endif
template <typename N, typename I, I... lane>
inline N pick_lanes(N a, N b, std::integer_sequence<I, lane...>) {
#if DLK_SHUFFLEVECTOR
  return __builtin_shufflevector(a, b, lane...);
#else
  typedef I Lanes __attribute__((vector_size(sizeof(N))));
  return __builtin_shuffle(a, b, Lanes{lane...});
#endif
}

// kPiece numbers are 16 bytes, and a vector is so many pieces.
template <typename T>
constexpr int64_t kPiece = 16 / sizeof(T);

// In each piece, element q of v[k] and element k of v[q] change places.
template <int... l>
inline void transpose_pieces(F (&v)[4], std::integer_sequence<int, l...>) {
  constexpr int n = int(F::size);
  using Interleave = std::integer_sequence<int32_t, (l / 4 * 4 + l % 4 / 2 + (l % 2 ? n : 0))...>;
  using InterleaveHigh =
      std::integer_sequence<int32_t, (l / 4 * 4 + 2 + l % 4 / 2 + (l % 2 ? n : 0))...>;
  using Halves = std::integer_sequence<int32_t, (l % 4 < 2 ? l : l - 2 + n)...>;
  using HighHalves = std::integer_sequence<int32_t, (l % 4 < 2 ? l + 2 : l + n)...>;
  const auto ab = pick_lanes(v[0].v, v[1].v, Interleave()),
             ab_high = pick_lanes(v[0].v, v[1].v, InterleaveHigh()),
             cd = pick_lanes(v[2].v, v[3].v, Interleave()),
             cd_high = pick_lanes(v[2].v, v[3].v, InterleaveHigh());
  v[0].v = pick_lanes(ab, cd, Halves());
  v[1].v = pick_lanes(ab, cd, HighHalves());
  v[2].v = pick_lanes(ab_high, cd_high, Halves());
  v[3].v = pick_lanes(ab_high, cd_high, HighHalves());
}
template <int... l>
inline void transpose_pieces(D (&v)[2], std::integer_sequence<int, l...>) {
  constexpr int n = int(D::size);
  const auto low =
      pick_lanes(v[0].v, v[1].v, std::integer_sequence<int64_t, (l % 2 ? l - 1 + n : l)...>());
  const auto high =
      pick_lanes(v[0].v, v[1].v, std::integer_sequence<int64_t, (l % 2 ? l + n : l + 1)...>());
  v[0].v = low;
  v[1].v = high;
}
template <typename T>
inline void transpose_pieces(Vec<T> (&v)[kPiece<T>]) {
  transpose_pieces(v, std::make_integer_sequence<int, int(Vec<T>::size)>());
}

// n lanes, 1 ≤ n ≤ size; the others load as 0 and are not stored. No byte beyond them is touched.
template <typename S>
inline Vec<accumulate_t<S>> load(const S* p, int64_t n) {
  return n == Vec<accumulate_t<S>>::size ? load(p) : load_first(p, n);
}
template <typename S>
inline void store(S* p, Vec<accumulate_t<S>> a, int64_t n) {
  n == Vec<accumulate_t<S>>::size ? store(p, a) : store_first(p, a, n);
}

template <typename T>
inline T first_element(Vec<T> a) {
  T element;
  store_first(&element, a, 1);
  return element;
}

// The first n lanes of a, the other lanes of b.
template <typename T>
inline Vec<T> first(int64_t n, Vec<T> a, Vec<T> b) {
  return select(first_lanes(a, n), a, b);
}

// exp(x) = 2^n · e^r, n = round(x / ln 2), |r| ≤ ln 2 / 2. Adding 1.5·2^23 + 127 (1.5·2^52 + 1023)
// rounds n and leaves n + bias in the low bits, which a shift turns into 2^n. Results below
// 2^-126.5 (2^-1022.5) are 0: results that are not normal cost some processors a hundred cycles;
// from n = 128 (1024) on they are inf. exp(−inf) = 0, exp(NaN) = NaN. The float polynomial is a
// minimax one of 1 + r·p(r), relative error 2e-9.
//
// Of n vectors side by side, so that no step waits for the one before.
template <int n>
inline void exp(F (&x)[n]) {
  const F magic(0x1.8p23f + 127.0f);
  F biased[n], p[n];
#define DLK_EACH for (int i = 0; i < n; ++i)
#pragma GCC unroll 8
  DLK_EACH x[i] = min(F(89.0f), max(F(-88.0f), x[i]));
#pragma GCC unroll 8
  DLK_EACH biased[i] = fma(x[i], F(1.44269504088896341f), magic);
#pragma GCC unroll 8
  DLK_EACH x[i] = fma(biased[i] - magic, F(-0.693359375f), x[i]);
#pragma GCC unroll 8
  DLK_EACH x[i] = fma(biased[i] - magic, F(2.12194440e-4f), x[i]);
#pragma GCC unroll 8
  DLK_EACH p[i] = fma(F(1.384360716e-3f), x[i], F(8.374195546e-3f));
#pragma GCC unroll 8
  DLK_EACH p[i] = fma(p[i], x[i], F(4.166800529e-2f));
#pragma GCC unroll 8
  DLK_EACH p[i] = fma(p[i], x[i], F(1.666643023e-1f));
#pragma GCC unroll 8
  DLK_EACH p[i] = fma(p[i], x[i], F(4.999999404e-1f));
#pragma GCC unroll 8
  DLK_EACH p[i] = fma(p[i], x[i], F(1.0f));
#pragma GCC unroll 8
  DLK_EACH p[i] = fma(p[i], x[i], F(1.0f));
#pragma GCC unroll 8
  DLK_EACH x[i] = p[i] * exponent_from_low_bits(biased[i]);
#undef DLK_EACH
}
inline F exp(F x) {
  F one[1] = {x};
  exp(one);
  return one[0];
}

inline D exp(D x) {
  x = min(D(710.0), max(D(-709.0), x));
  const D magic(0x1.8p52 + 1023.0);
  const D biased = fma(x, D(1.4426950408889634073599), magic);
  const D n = biased - magic;
  D r = fma(n, D(-6.93145751953125e-1), x);
  r = fma(n, D(-1.42860682030941723212e-6), r);
  const D z = r * r;
  D p = D(1.26177193074810590878e-4);
  p = fma(p, z, D(3.02994407707441961300e-2));
  p = fma(p, z, D(9.99999999999999999910e-1)) * r;
  D q = D(3.00198505138664455042e-6);
  q = fma(q, z, D(2.52448340349684104192e-3));
  q = fma(q, z, D(2.27265548208155028766e-1));
  q = fma(q, z, D(2.0));
  const D half = p / (q - p);  // (e^r − 1) / 2
  return fma(half, D(2.0), D(1.0)) * exponent_from_low_bits(biased);
}

// log(x) for normal x > 0; NaN gives NaN. x = m·2^e with m in [√½, √2).
inline F log(F x) {
  F m, e;
  split_exponent(x, m, e);
  const auto small = less(m, F(0.707106781186547524f));
  e = select(small, e - F(1.0f), e);
  m = select(small, m + m, m) - F(1.0f);
  const F z = m * m;
  F p = F(7.0376836292e-2f);
  p = fma(p, m, F(-1.1514610310e-1f));
  p = fma(p, m, F(1.1676998740e-1f));
  p = fma(p, m, F(-1.2420140846e-1f));
  p = fma(p, m, F(1.4249322787e-1f));
  p = fma(p, m, F(-1.6668057665e-1f));
  p = fma(p, m, F(2.0000714765e-1f));
  p = fma(p, m, F(-2.4999993993e-1f));
  p = fma(p, m, F(3.3333331174e-1f));
  F y = p * m * z;
  y = fma(e, F(-2.12194440e-4f), y);
  y = fma(z, F(-0.5f), y);
  return fma(e, F(0.693359375f), m + y) + (x - x);
}

inline D log(D x) {
  D m, e;
  split_exponent(x, m, e);
  const auto small = less(m, D(0.70710678118654752440));
  e = select(small, e - D(1.0), e);
  m = select(small, m + m, m) - D(1.0);
  const D z = m * m;
  D p = D(1.01875663804580931796e-4);
  p = fma(p, m, D(4.97494994976747001425e-1));
  p = fma(p, m, D(4.70579119878881725854));
  p = fma(p, m, D(1.44989225341610930846e1));
  p = fma(p, m, D(1.79368678507819816313e1));
  p = fma(p, m, D(7.70838733755885391666));
  D q = m + D(1.12873587189167450590e1);
  q = fma(q, m, D(4.52279145837532221105e1));
  q = fma(q, m, D(8.29875266912776603211e1));
  q = fma(q, m, D(7.11544750618563894466e1));
  q = fma(q, m, D(2.31251620126765340583e1));
  D y = m * (z * p / q);
  y = fma(e, D(-2.121944400546905827679e-4), y);
  y = fma(z, D(-0.5), y);
  return fma(e, D(0.693359375), m + y) + (x - x);
}

template <int n>
inline void exp(D (&x)[n]) {
  for (int i = 0; i < n; ++i) x[i] = exp(x[i]);
}

// tanh: an odd polynomial below 0.625, 1 − 2 / (e^2|x| + 1) above. The sign is set last: the
// polynomial loses that of −0. Here from x and e^2|x|.
inline F tanh_from_exp(F x, F e) {
  const F z = x * x;
  F p = F(-5.70498872745e-3f);
  p = fma(p, z, F(2.06390887954e-2f));
  p = fma(p, z, F(-5.37397155531e-2f));
  p = fma(p, z, F(1.33314422036e-1f));
  p = fma(p, z, F(-3.33332819422e-1f));
  const F near = fma(p * z, x, x);
  const F far = F(1.0f) - F(2.0f) / (e + F(1.0f));
  return copysign(select(less(abs(x), F(0.625f)), near, far), x);
}
inline D tanh_from_exp(D x, D e) {
  const D z = x * x;
  D p = D(-9.64399179425052238628e-1);
  p = fma(p, z, D(-9.92877231001918586564e1));
  p = fma(p, z, D(-1.61468768441708447952e3));
  D q = z + D(1.12811678491632931402e2);
  q = fma(q, z, D(2.23548839060100448583e3));
  q = fma(q, z, D(4.84406305325125486048e3));
  const D near = fma(p / q * z, x, x);
  const D far = D(1.0) - D(2.0) / (e + D(1.0));
  return copysign(select(less(abs(x), D(0.625)), near, far), x);
}
template <typename T>
inline Vec<T> tanh(Vec<T> x) {
  return tanh_from_exp(x, exp(abs(x) + abs(x)));
}
template <typename T, int n>
inline void tanh(Vec<T> (&x)[n]) {
  Vec<T> e[n];
  for (int i = 0; i < n; ++i) e[i] = abs(x[i]) + abs(x[i]);
  exp(e);
  for (int i = 0; i < n; ++i) x[i] = tanh_from_exp(x[i], e[i]);
}

}  // namespace dlkernels
