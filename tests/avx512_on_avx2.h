// The AVX-512 branch of csrc/cpu/simd.h on a CPU without AVX-512: -include this file, with -mavx2
// -mfma -mf16c -Wno-psabi. It defines every AVX-512 intrinsic that simd.h uses, on the compiler's
// own types __m512, __m512d, __m512i, in the namespace of the library, where the unchanged source
// finds them before those of <immintrin.h>. One that is missing here is an error of the compiler.
//
// Masked loads and stores touch exactly the lanes of their mask, as the instructions do; max and
// min return their second operand where either is NaN; reductions add in the order of gcc's.
#pragma once

// First, with __AVX512F__ undefined: the header then marks its own AVX-512 functions as such.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1

// Macros where nothing is optimised, and in clang.
#undef _mm512_cmp_pd_mask
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x4_ps
#undef _mm512_extractf64x2_pd
#undef _mm512_insertf32x4
#undef _mm512_insertf64x2
#undef _mm512_slli_epi32
#undef _mm512_slli_epi64
#undef _mm512_srli_epi32
#undef _mm512_srli_epi64

namespace dlkernels {
namespace avx512 {

template <typename To, typename From>
inline To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename Half, typename Whole>
inline Half half(Whole a, int which) {
  Half to;
  std::memcpy(&to, reinterpret_cast<const char*>(&a) + sizeof(Half) * which, sizeof(Half));
  return to;
}
template <typename Whole, typename Half>
inline Whole join(Half low, Half high) {
  static_assert(sizeof(Whole) == 2 * sizeof(Half));
  Whole to;
  std::memcpy(&to, &low, sizeof(Half));
  std::memcpy(reinterpret_cast<char*>(&to) + sizeof(Half), &high, sizeof(Half));
  return to;
}

template <typename T, typename Vector>
inline Vector load(Vector v, uint32_t mask, const void* p) {
  for (size_t i = 0; i < sizeof(Vector) / sizeof(T); ++i)
    if (mask >> i & 1)
      std::memcpy(reinterpret_cast<char*>(&v) + i * sizeof(T),
                  static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
  return v;
}
template <typename T, typename Vector>
inline void store(void* p, uint32_t mask, Vector v) {
  for (size_t i = 0; i < sizeof(Vector) / sizeof(T); ++i)
    if (mask >> i & 1)
      std::memcpy(static_cast<char*>(p) + i * sizeof(T),
                  reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof(T));
}

}  // namespace avx512

// name on To, of From: function on each half.
#define DLK_1(To, name, From, Half, function)                    \
  inline To name(From a) {                                       \
    return avx512::join<To>(function(avx512::half<Half>(a, 0)),  \
                            function(avx512::half<Half>(a, 1))); \
  }
#define DLK_2(T, name, Half, function)                                                    \
  inline T name(T a, T b) {                                                               \
    return avx512::join<T>(function(avx512::half<Half>(a, 0), avx512::half<Half>(b, 0)),  \
                           function(avx512::half<Half>(a, 1), avx512::half<Half>(b, 1))); \
  }
#define DLK_3(T, name, Half, function)                                                           \
  inline T name(T a, T b, T c) {                                                                 \
    return avx512::join<T>(                                                                      \
        function(avx512::half<Half>(a, 0), avx512::half<Half>(b, 0), avx512::half<Half>(c, 0)),  \
        function(avx512::half<Half>(a, 1), avx512::half<Half>(b, 1), avx512::half<Half>(c, 1))); \
  }
#define DLK_SHIFT(name, function)                                               \
  inline __m512i name(__m512i a, int count) {                                   \
    return avx512::join<__m512i>(function(avx512::half<__m256i>(a, 0), count),  \
                                 function(avx512::half<__m256i>(a, 1), count)); \
  }

DLK_2(__m512, _mm512_add_ps, __m256, _mm256_add_ps)
DLK_2(__m512, _mm512_sub_ps, __m256, _mm256_sub_ps)
DLK_2(__m512, _mm512_mul_ps, __m256, _mm256_mul_ps)
DLK_2(__m512, _mm512_div_ps, __m256, _mm256_div_ps)
DLK_2(__m512, _mm512_max_ps, __m256, _mm256_max_ps)
DLK_2(__m512, _mm512_min_ps, __m256, _mm256_min_ps)
DLK_2(__m512, _mm512_and_ps, __m256, _mm256_and_ps)
DLK_2(__m512, _mm512_andnot_ps, __m256, _mm256_andnot_ps)
DLK_2(__m512, _mm512_or_ps, __m256, _mm256_or_ps)
DLK_3(__m512, _mm512_fmadd_ps, __m256, _mm256_fmadd_ps)
DLK_2(__m512d, _mm512_add_pd, __m256d, _mm256_add_pd)
DLK_2(__m512d, _mm512_sub_pd, __m256d, _mm256_sub_pd)
DLK_2(__m512d, _mm512_mul_pd, __m256d, _mm256_mul_pd)
DLK_2(__m512d, _mm512_div_pd, __m256d, _mm256_div_pd)
DLK_2(__m512d, _mm512_max_pd, __m256d, _mm256_max_pd)
DLK_2(__m512d, _mm512_min_pd, __m256d, _mm256_min_pd)
DLK_2(__m512d, _mm512_and_pd, __m256d, _mm256_and_pd)
DLK_2(__m512d, _mm512_andnot_pd, __m256d, _mm256_andnot_pd)
DLK_2(__m512d, _mm512_or_pd, __m256d, _mm256_or_pd)
DLK_3(__m512d, _mm512_fmadd_pd, __m256d, _mm256_fmadd_pd)
DLK_2(__m512i, _mm512_and_si512, __m256i, _mm256_and_si256)
DLK_2(__m512i, _mm512_or_si512, __m256i, _mm256_or_si256)
DLK_2(__m512i, _mm512_add_epi32, __m256i, _mm256_add_epi32)
DLK_2(__m512i, _mm512_sub_epi32, __m256i, _mm256_sub_epi32)
DLK_2(__m512i, _mm512_sub_epi64, __m256i, _mm256_sub_epi64)
DLK_SHIFT(_mm512_slli_epi32, _mm256_slli_epi32)
DLK_SHIFT(_mm512_slli_epi64, _mm256_slli_epi64)
DLK_SHIFT(_mm512_srli_epi32, _mm256_srli_epi32)
DLK_SHIFT(_mm512_srli_epi64, _mm256_srli_epi64)
DLK_1(__m512, _mm512_cvtepi32_ps, __m512i, __m256i, _mm256_cvtepi32_ps)
DLK_1(__m512i, _mm512_cvtepu16_epi32, __m256i, __m128i, _mm256_cvtepu16_epi32)
DLK_1(__m512, _mm512_cvtph_ps, __m256i, __m128i, _mm256_cvtph_ps)

#undef DLK_1
#undef DLK_2
#undef DLK_3
#undef DLK_SHIFT

#define DLK_CAST(To, name, From)        \
  inline To name(From a) {              \
    To to{};                            \
    std::memcpy(&to, &a, sizeof(From)); \
    return to;                          \
  }
#define DLK_PIECE(Vector, Piece, insert, extract)                         \
  inline Vector insert(Vector a, Piece piece, int at) {                   \
    std::memcpy(reinterpret_cast<char*>(&a) + 16 * at, &piece, 16);       \
    return a;                                                             \
  }                                                                       \
  inline Piece extract(Vector a, int at) {                                \
    Piece piece;                                                          \
    std::memcpy(&piece, reinterpret_cast<const char*>(&a) + 16 * at, 16); \
    return piece;                                                         \
  }
DLK_CAST(__m512, _mm512_castps128_ps512, __m128)
DLK_CAST(__m512d, _mm512_castpd128_pd512, __m128d)
DLK_PIECE(__m512, __m128, _mm512_insertf32x4, _mm512_extractf32x4_ps)
DLK_PIECE(__m512d, __m128d, _mm512_insertf64x2, _mm512_extractf64x2_pd)
#undef DLK_CAST
#undef DLK_PIECE
inline __m128 _mm512_castps512_ps128(__m512 a) { return _mm512_extractf32x4_ps(a, 0); }
inline __m128d _mm512_castpd512_pd128(__m512d a) { return _mm512_extractf64x2_pd(a, 0); }
inline __m256 _mm512_castps512_ps256(__m512 a) { return avx512::half<__m256>(a, 0); }
#define _mm512_extractf32x8_ps(a, at) avx512::half<__m256>(a, at)
inline __m512d _mm512_cvtps_pd(__m256 a) {
  return avx512::join<__m512d>(_mm256_cvtps_pd(_mm256_castps256_ps128(a)),
                               _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
}
inline __m256 _mm512_cvtpd_ps(__m512d a) {
  return avx512::join<__m256>(_mm256_cvtpd_ps(avx512::half<__m256d>(a, 0)),
                              _mm256_cvtpd_ps(avx512::half<__m256d>(a, 1)));
}

// a - 0, not a + 0: that loses the sign of -0.
inline __m512 _mm512_set1_ps(float a) { return a - __m512{}; }
inline __m512d _mm512_set1_pd(double a) { return a - __m512d{}; }
inline __m512i _mm512_set1_epi64(int64_t a) { return __m512i{} + a; }
inline __m512i _mm512_set1_epi32(int32_t a) {
  return _mm512_set1_epi64(int64_t(uint64_t(uint32_t(a)) << 32 | uint32_t(a)));
}

inline __m512i _mm512_castps_si512(__m512 a) { return avx512::as<__m512i>(a); }
inline __m512i _mm512_castpd_si512(__m512d a) { return avx512::as<__m512i>(a); }
inline __m512 _mm512_castsi512_ps(__m512i a) { return avx512::as<__m512>(a); }
inline __m512d _mm512_castsi512_pd(__m512i a) { return avx512::as<__m512d>(a); }

inline __m512 _mm512_abs_ps(__m512 a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
inline __m512d _mm512_abs_pd(__m512d a) { return _mm512_andnot_pd(_mm512_set1_pd(-0.0), a); }

inline __m512d _mm512_cvtepi64_pd(__m512i a) {
  __m512d to;
  for (int i = 0; i < 8; ++i) to[i] = double(a[i]);
  return to;
}
// Truncated, unlike the AVX2 instructions that pack: those saturate.
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  uint32_t from[16];
  uint16_t to[16];
  std::memcpy(from, &a, sizeof(from));
  for (int i = 0; i < 16; ++i) to[i] = uint16_t(from[i]);
  __m256i result;
  std::memcpy(&result, to, sizeof(to));
  return result;
}
inline __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
  if (rounding != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
  return avx512::join<__m256i>(_mm256_cvtps_ph(avx512::half<__m256>(a, 0), nearest),
                               _mm256_cvtps_ph(avx512::half<__m256>(a, 1), nearest));
}

inline bool compare(double a, double b, int how) {
  if (how == _CMP_LT_OQ) return a < b;
  if (how == _CMP_UNORD_Q) return a != a || b != b;
  __builtin_trap();
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint32_t(compare(a[i], b[i], how)) << i;
  return __mmask16(mask);
}
inline __mmask8 _mm512_cmp_pd_mask(__m512d a, __m512d b, int how) {
  uint32_t mask = 0;
  for (int i = 0; i < 8; ++i) mask |= uint32_t(compare(a[i], b[i], how)) << i;
  return __mmask8(mask);
}

// Lanes of b where the bit is set.
inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  return avx512::load<float>(a, mask, &b);
}
inline __m512d _mm512_mask_blend_pd(__mmask8 mask, __m512d a, __m512d b) {
  return avx512::load<double>(a, mask, &b);
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
  return avx512::load<int32_t>(a, mask, &b);
}

inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 to;
  std::memcpy(&to, p, sizeof(to));
  return to;
}
inline __m512d _mm512_loadu_pd(const void* p) {
  __m512d to;
  std::memcpy(&to, p, sizeof(to));
  return to;
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return avx512::load<float>(__m512{}, mask, p);
}
inline __m512d _mm512_maskz_loadu_pd(__mmask8 mask, const void* p) {
  return avx512::load<double>(__m512d{}, mask, p);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return avx512::load<int16_t>(__m256i{}, mask, p);
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return avx512::load<int16_t>(__m512i{}, mask, p);
}
// One multiply-add after the other, the low halves last.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto number = [](__m512bh v, int at) {
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const char*>(&v) + 2 * at, 2);
    return avx512::as<float>(uint32_t(bits) << 16);
  };
  for (int i = 0; i < 16; ++i)
    for (int at = 2 * i + 1; at >= 2 * i; --at)
      sum[i] = __builtin_fmaf(number(a, at), number(b, at), sum[i]);
  return sum;
}
inline void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof(a)); }
inline void _mm512_storeu_pd(void* p, __m512d a) { std::memcpy(p, &a, sizeof(a)); }
inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 a) {
  avx512::store<float>(p, mask, a);
}
inline void _mm512_mask_storeu_pd(void* p, __mmask8 mask, __m512d a) {
  avx512::store<double>(p, mask, a);
}
inline void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i a) {
  avx512::store<int16_t>(p, mask, a);
}

// Halves onto each other until two lanes are left.
inline float _mm512_reduce_add_ps(__m512 a) {
  const __m256 b = _mm256_add_ps(avx512::half<__m256>(a, 1), avx512::half<__m256>(a, 0));
  const __m128 c = _mm_add_ps(avx512::half<__m128>(b, 1), avx512::half<__m128>(b, 0));
  return (c[0] + c[2]) + (c[1] + c[3]);
}
inline double _mm512_reduce_add_pd(__m512d a) {
  const __m256d b = _mm256_add_pd(avx512::half<__m256d>(a, 1), avx512::half<__m256d>(a, 0));
  const __m128d c = _mm_add_pd(avx512::half<__m128d>(b, 1), avx512::half<__m128d>(b, 0));
  return c[0] + c[1];
}
inline float _mm512_reduce_max_ps(__m512 a) {
  const __m256 b = _mm256_max_ps(avx512::half<__m256>(a, 1), avx512::half<__m256>(a, 0));
  const __m128 c = _mm_max_ps(avx512::half<__m128>(b, 1), avx512::half<__m128>(b, 0));
  const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}
inline double _mm512_reduce_max_pd(__m512d a) {
  const __m256d b = _mm256_max_pd(avx512::half<__m256d>(a, 1), avx512::half<__m256d>(a, 0));
  const __m128d c = _mm_max_pd(avx512::half<__m128d>(b, 1), avx512::half<__m128d>(b, 0));
  return _mm_cvtsd_f64(_mm_max_sd(c, _mm_unpackhi_pd(c, c)));
}

}  // namespace dlkernels
