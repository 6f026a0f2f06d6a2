// csrc/cpu/simd.h behind a C ABI, for tests/test_simd.py. `name_type` works on n elements, vector
// by vector through load(p, n) and store(p, a, n); arrays of one vector hold `size` elements.
#include "simd.h"

namespace dlkernels {
namespace {

template <typename T, typename Function, typename... P>
void map(Function function, T* out, int64_t n, const P*... in) {
  for (int64_t i = 0; i < n; i += Vec<T>::size) {
    const int64_t lanes = n - i < Vec<T>::size ? n - i : Vec<T>::size;
    store(out + i, function(load(in + i, lanes)...), lanes);
  }
}

// The bits of the lanes that are less, and the lanes of given bits.
template <typename T>
uint32_t bits_of_less(const T* a, const T* b) {
  return bits_of(load(a), less(load(a), load(b)));
}
template <typename T>
void select_bits(T* out, uint32_t bits, const T* yes, const T* no) {
  store(out, select(mask_of(load(yes), bits), load(yes), load(no)));
}

// A matrix of Vec::size rows of kPiece columns, `stride` apart, to its columns; and back.
template <typename T>
void transpose_rows(const T* in, int64_t stride, T* out) {
  constexpr int64_t n = kPiece<T>;
  Vec<T> v[n];
  for (int64_t q = 0; q < n; ++q) v[q] = load_pieces(in + q * stride, n * stride);
  transpose_pieces(v);
  for (int64_t k = 0; k < n; ++k) store(out + k * Vec<T>::size, v[k]);
}
template <typename T>
void transpose_columns(const T* in, T* out, int64_t stride) {
  constexpr int64_t n = kPiece<T>;
  Vec<T> v[n];
  for (int64_t k = 0; k < n; ++k) v[k] = load(in + k * Vec<T>::size);
  transpose_pieces(v);
  for (int64_t q = 0; q < n; ++q) store_pieces(out + q * stride, n * stride, v[q]);
}

}  // namespace
}  // namespace dlkernels

using namespace dlkernels;

#define EXPORT extern "C" __attribute__((visibility("default")))

#define MAP1(T, function)                                              \
  EXPORT void function##_##T(T* out, int64_t n, const T* a) {          \
    map<T>([](Vec<T> x) -> Vec<T> { return function(x); }, out, n, a); \
  }
#define MAP2(T, name, expression)                                                  \
  EXPORT void name##_##T(T* out, int64_t n, const T* a, const T* b) {              \
    map<T>([](Vec<T> x, Vec<T> y) -> Vec<T> { return expression; }, out, n, a, b); \
  }
#define PROBE(T)                                                                                 \
  EXPORT int64_t size_##T() { return Vec<T>::size; }                                             \
  MAP1(T, exp)                                                                                   \
  MAP1(T, log)                                                                                   \
  MAP1(T, tanh)                                                                                  \
  MAP1(T, abs)                                                                                   \
  MAP2(T, add, x + y)                                                                            \
  MAP2(T, sub, x - y)                                                                            \
  MAP2(T, mul, x* y)                                                                             \
  MAP2(T, div, x / y)                                                                            \
  MAP2(T, max, max(x, y))                                                                        \
  MAP2(T, min, min(x, y))                                                                        \
  MAP2(T, copysign, copysign(x, y))                                                              \
  MAP2(T, less, select(less(x, y), Vec<T>(T(1)), Vec<T>(T(0))))                                  \
  MAP2(T, exceeds, select(exceeds(x, y), Vec<T>(T(1)), Vec<T>(T(0))))                            \
  EXPORT void select_##T(T* out, int64_t n, const T* a, const T* b, const T* yes, const T* no) { \
    map<T>([](Vec<T> x, Vec<T> y, Vec<T> u, Vec<T> v) { return select(less(x, y), u, v); }, out, \
           n, a, b, yes, no);                                                                    \
  }                                                                                              \
  EXPORT void fma_##T(T* out, int64_t n, const T* a, const T* b, const T* c) {                   \
    map<T>([](Vec<T> x, Vec<T> y, Vec<T> z) { return fma(x, y, z); }, out, n, a, b, c);          \
  }                                                                                              \
  EXPORT void broadcast_##T(T* out, T value) { store(out, Vec<T>(value)); }                      \
  EXPORT T sum_##T(const T* a) { return sum(load(a)); }                                          \
  EXPORT T max_element_##T(const T* a) { return max_element(load(a)); }                          \
  EXPORT void first_##T(T* out, int64_t n, const T* a, const T* b) {                             \
    store(out, first(n, load(a), load(b)));                                                      \
  }                                                                                              \
  EXPORT uint32_t bits_of_##T(const T* a, const T* b) { return bits_of_less(a, b); }             \
  EXPORT void mask_of_##T(T* out, int64_t bits, const T* yes, const T* no) {                     \
    select_bits(out, uint32_t(bits), yes, no);                                                   \
  }                                                                                              \
  EXPORT void transpose_rows_##T(const T* in, int64_t stride, T* out) {                          \
    transpose_rows<T>(in, stride, out);                                                          \
  }                                                                                              \
  EXPORT void transpose_columns_##T(const T* in, T* out, int64_t stride) {                       \
    transpose_columns<T>(in, out, stride);                                                       \
  }                                                                                              \
  EXPORT void load_double_##T(const T* in, double* out) { store(out, load_double(in)); }         \
  EXPORT void store_rounded_##T(const double* in, T* out) { store_rounded(out, load(in)); }      \
  EXPORT void to_doubles_##T(const T* in, double* out) {                                         \
    Vec<double> parts[sizeof(double) / sizeof(T)];                                               \
    to_doubles(load(in), parts);                                                                 \
    for (const auto& part : parts) store(out, part), out += Vec<double>::size;                   \
  }

// load: the lanes of load(p, n), or of load(p) where n is 0, as they arrive; store likewise.
#define MEMORY(S)                                                              \
  EXPORT void load_##S(const S* p, int64_t n, accumulate_t<S>* lanes) {        \
    store(lanes, n ? load(p, n) : load(p));                                    \
  }                                                                            \
  EXPORT void store_##S(S* p, int64_t n, const accumulate_t<S>* lanes) {       \
    n ? store(p, load(lanes), n) : store(p, load(lanes));                      \
  }                                                                            \
  EXPORT void load_first_##S(const S* p, int64_t n, accumulate_t<S>* lanes) {  \
    store(lanes, load_first(p, n));                                            \
  }                                                                            \
  EXPORT void store_first_##S(S* p, int64_t n, const accumulate_t<S>* lanes) { \
    store_first(p, load(lanes), n);                                            \
  }

// Conversions of n elements: by vectors (`_vectors`), and one by one (`_elements`).
#define CONVERSIONS(S)                                                           \
  EXPORT void widen_vectors_##S(float* out, int64_t n, const S* in) {            \
    map<float>([](Vec<float> x) { return x; }, out, n, in);                      \
  }                                                                              \
  EXPORT void narrow_vectors_##S(S* out, int64_t n, const float* in) {           \
    for (int64_t i = 0; i < n; i += Vec<float>::size) {                          \
      const int64_t lanes = n - i < Vec<float>::size ? n - i : Vec<float>::size; \
      store(out + i, load(in + i, lanes), lanes);                                \
    }                                                                            \
  }                                                                              \
  EXPORT void widen_elements_##S(float* out, int64_t n, const S* in) {           \
    for (int64_t i = 0; i < n; ++i) out[i] = widen(in[i]);                       \
  }                                                                              \
  EXPORT void narrow_elements_##S(S* out, int64_t n, const float* in) {          \
    for (int64_t i = 0; i < n; ++i) out[i] = narrow<S>(in[i]);                   \
  }

PROBE(float)
PROBE(double)
MEMORY(float)
MEMORY(double)
MEMORY(bf16)
MEMORY(f16)
CONVERSIONS(bf16)
CONVERSIONS(f16)
