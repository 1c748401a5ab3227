// AVX-512 on a CPU that lacks it: what csrc/cpu uses of it, on AVX2 and vectors of GCC's, included before everything
// else (`make avx512`). It runs the kernels' own code, for their results; their speed it cannot tell. What real
// hardware would fault on, an address that is not aligned for a streaming store, is an abort here too.
#pragma once
#include <immintrin.h>  // before the macros below, which tell the sources alone
#include <stdint.h>
#include <string.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#if defined(FASTLLM_EMULATE_BF16)
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#endif
#define __builtin_cpu_supports(name) 1  // dispatch.cpp

namespace emulated {
namespace {

#define EMULATED static inline __attribute__((always_inline))
#define EACH(n, Vector, expression)                      \
  ({                                                     \
    Vector lanes;                                        \
    for (int i = 0; i < (n); ++i) lanes[i] = expression; \
    lanes;                                               \
  })

using F = __m512;
using D = __m512d;
using I = __m512i;
using Int = __v16si;
using Word = __v16su;
using Short = __v32hi;
typedef uint16_t UShort __attribute__((vector_size(64)));
typedef uint8_t Byte __attribute__((vector_size(64)));
typedef int8_t Char __attribute__((vector_size(64)));

template <class To, class From>
EMULATED To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
template <class V>
EMULATED V at(const void* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}
// The parts of 128 or 256 bits of a vector, and a vector of two of 256.
template <class Part, class V>
EMULATED Part part(V x, int i) {
  Part y;
  memcpy(&y, (const char*)&x + i * sizeof y, sizeof y);
  return y;
}
template <class V, class Half>
EMULATED V join(Half low, Half high) {
  V x;
  memcpy(&x, &low, sizeof low);
  memcpy((char*)&x + sizeof low, &high, sizeof high);
  return x;
}
template <class Vector, class T>
EMULATED Vector loaded(uint64_t mask, const T* p) {  // memory where the mask is 0 is never touched
  constexpr int n = sizeof(Vector) / sizeof(T);
  T lanes[n] = {};
  for (int i = 0; i < n; ++i)
    if (mask >> i & 1) lanes[i] = p[i];
  return at<Vector>(lanes);
}
template <class T, class Vector>
EMULATED void store(void* to, uint64_t mask, Vector x) {
  T lanes[sizeof x / sizeof(T)];
  memcpy(lanes, &x, sizeof x);
  for (int i = 0; i < int(sizeof x / sizeof(T)); ++i)
    if (mask >> i & 1) memcpy((T*)to + i, lanes + i, sizeof(T));
}

EMULATED F set1_ps(float x) { return EACH(16, F, x); }
EMULATED I set1_epi32(int32_t x) { return (I)EACH(16, Int, x); }
EMULATED I set1_epi16(int16_t x) { return (I)EACH(32, Short, x); }
EMULATED I set1_epi8(int8_t x) { return (I)EACH(64, Char, x); }
EMULATED F setzero_ps() { return F{}; }
EMULATED I setzero_si512() { return I{}; }
template <class... T>
EMULATED F setr_ps(T... x) {
  const float given[] = {float(x)...};
  return at<F>(given);
}
template <class... T>
EMULATED I set_epi16(T... x) {
  const int16_t given[] = {int16_t(x)...};
  return (I)EACH(32, Short, given[31 - i]);
}

EMULATED F loadu_ps(const void* p) { return at<F>(p); }
EMULATED I loadu_si512(const void* p) { return at<I>(p); }
EMULATED void storeu_ps(void* p, F x) { memcpy(p, &x, sizeof x); }
EMULATED void storeu_si512(void* p, I x) { memcpy(p, &x, sizeof x); }
EMULATED void stream_ps(void* p, F x) {
  if ((uintptr_t)p % 64) __builtin_trap();
  memcpy(p, &x, sizeof x);
}
EMULATED F maskz_loadu_ps(__mmask16 m, const void* p) { return loaded<F>(m, (const float*)p); }
EMULATED I maskz_loadu_epi16(__mmask32 m, const void* p) { return loaded<I>(m, (const int16_t*)p); }
EMULATED __m256i maskz_loadu_epi16_256(__mmask16 m, const void* p) { return loaded<__m256i>(m, (const int16_t*)p); }
EMULATED __m128i maskz_loadu_epi8_128(__mmask16 m, const void* p) { return loaded<__m128i>(m, (const int8_t*)p); }
EMULATED void mask_storeu_ps(void* p, __mmask16 m, F x) { store<float>(p, m, x); }
EMULATED void mask_storeu_epi16_256(void* p, __mmask16 m, __m256i x) { store<int16_t>(p, m, x); }

EMULATED F add_ps(F a, F b) { return a + b; }
EMULATED F sub_ps(F a, F b) { return a - b; }
EMULATED F mul_ps(F a, F b) { return a * b; }
EMULATED F div_ps(F a, F b) { return a / b; }
EMULATED F max_ps(F a, F b) { return a > b ? a : b; }  // b where one is NaN
EMULATED F min_ps(F a, F b) { return a < b ? a : b; }
EMULATED F abs_ps(F a) { return (F)((Int)a & 0x7fffffff); }
#define BY_HALVES(Half, call) join<F>(call(part<Half>(a, 0)), call(part<Half>(a, 1)))
EMULATED F sqrt_ps(F a) { return BY_HALVES(__m256, _mm256_sqrt_ps); }
EMULATED F cvtph_ps(__m256i a) { return BY_HALVES(__m128i, _mm256_cvtph_ps); }
EMULATED F fmadd_ps(F a, F b, F c) {
  return join<F>(_mm256_fmadd_ps(part<__m256>(a, 0), part<__m256>(b, 0), part<__m256>(c, 0)),
                 _mm256_fmadd_ps(part<__m256>(a, 1), part<__m256>(b, 1), part<__m256>(c, 1)));
}
EMULATED I cvtps_epi32(F a) {
  return join<I>(_mm256_cvtps_epi32(part<__m256>(a, 0)), _mm256_cvtps_epi32(part<__m256>(a, 1)));
}
EMULATED __m256i cvtps_ph(F a, int) {
  return join<__m256i>(_mm256_cvtps_ph(part<__m256>(a, 0), _MM_FROUND_TO_NEAREST_INT),
                       _mm256_cvtps_ph(part<__m256>(a, 1), _MM_FROUND_TO_NEAREST_INT));
}

EMULATED F castsi512_ps(I a) { return (F)a; }
EMULATED I castps_si512(F a) { return (I)a; }
EMULATED D castps_pd(F a) { return (D)a; }
EMULATED F castpd_ps(D a) { return (F)a; }
EMULATED F cvtepi32_ps(I a) { return EACH(16, F, float(((Int)a)[i])); }
EMULATED I cvtepu16_epi32(__m256i a) { return (I)EACH(16, Int, bits_of<__v16hu>(a)[i]); }
EMULATED I cvtepu8_epi32(__m128i a) { return (I)EACH(16, Int, bits_of<__v16qu>(a)[i]); }
EMULATED __m256i cvtepi32_epi16(I a) { return (__m256i)EACH(16, __v16hi, int16_t(((Int)a)[i])); }
EMULATED __m128i cvtepi32_epi8(I a) { return (__m128i)EACH(16, __v16qi, char(((Int)a)[i])); }

EMULATED I and_si512(I a, I b) { return a & b; }
EMULATED I xor_si512(I a, I b) { return a ^ b; }
EMULATED I ternarylogic_epi32(I a, I b, I c, int table) {
  if (table != 0x96) __builtin_trap();  // a ^ b ^ c, the only one in use
  return a ^ b ^ c;
}
EMULATED I add_epi32(I a, I b) { return (I)((Word)a + (Word)b); }
EMULATED I sub_epi32(I a, I b) { return (I)((Word)a - (Word)b); }
EMULATED I add_epi16(I a, I b) { return (I)((UShort)a + (UShort)b); }
EMULATED I mul_epu32(I a, I b) { return (I)(((__v8du)a & 0xffffffff) * ((__v8du)b & 0xffffffff)); }
EMULATED I slli_epi32(I a, int n) { return (I)((Word)a << n); }
EMULATED I srli_epi32(I a, int n) { return (I)((Word)a >> n); }
EMULATED I srai_epi32(I a, int n) { return (I)((Int)a >> n); }
EMULATED I srli_epi16(I a, int n) { return (I)((UShort)a >> n); }
EMULATED I slli_epi64(I a, int n) { return (I)((__v8du)a << n); }
EMULATED I srli_epi64(I a, int n) { return (I)((__v8du)a >> n); }
EMULATED I sll_epi32(I a, __m128i count) {
  const uint64_t n = bits_of<__v2du>(count)[0];
  return n > 31 ? I{} : slli_epi32(a, int(n));
}

EMULATED __mmask16 cmp_ps_mask(F a, F b, int predicate) {
  Int found{};
  switch (predicate) {
    case _CMP_UNORD_Q:
      found = (a != a) | (b != b);
      break;
    case _CMP_LT_OQ:
      found = a < b;
      break;
    case _CMP_NLT_UQ:
      found = ~(a < b);
      break;
    default:
      __builtin_trap();
  }
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint32_t(found[i] & 1) << i;
  return __mmask16(mask);
}
EMULATED __mmask16 fpclass_ps_mask(F a, int classes) {
  if (classes != 0x99) __builtin_trap();  // NaN of both kinds and both infinities, the only ones in use
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint32_t((((Word)a)[i] & 0x7fffffff) >= 0x7f800000) << i;
  return __mmask16(mask);
}
EMULATED F mask_blend_ps(__mmask16 m, F a, F b) { return EACH(16, F, m >> i & 1 ? b[i] : a[i]); }
EMULATED I mask_blend_epi32(__mmask16 m, I a, I b) { return (I)mask_blend_ps(m, (F)a, (F)b); }
EMULATED I mask_mov_epi32(I a, __mmask16 m, I b) { return mask_blend_epi32(m, a, b); }
EMULATED F maskz_mov_ps(__mmask16 m, F b) { return mask_blend_ps(m, F{}, b); }

// In every part of 128 bits.
EMULATED F permute_ps(F a, int order) { return EACH(16, F, a[i / 4 * 4 + (order >> i % 4 * 2 & 3)]); }
EMULATED F unpacklo_ps(F a, F b) { return EACH(16, F, (i % 2 ? b : a)[i / 4 * 4 + i % 4 / 2]); }
EMULATED F unpackhi_ps(F a, F b) { return EACH(16, F, (i % 2 ? b : a)[i / 4 * 4 + 2 + i % 4 / 2]); }
EMULATED D unpacklo_pd(D a, D b) { return EACH(8, D, (i % 2 ? b : a)[i / 2 * 2]); }
EMULATED D unpackhi_pd(D a, D b) { return EACH(8, D, (i % 2 ? b : a)[i / 2 * 2 + 1]); }
// Across them.
EMULATED F shuffle_f32x4(F a, F b, int order) {
  return EACH(16, F, (i < 8 ? a : b)[(order >> i / 4 * 2 & 3) * 4 + i % 4]);
}
EMULATED I permutexvar_epi16(I order, I a) { return (I)EACH(32, Short, ((Short)a)[((Short)order)[i] & 31]); }
EMULATED I permutex2var_epi16(I a, I order, I b) {
  return (I)EACH(32, Short, ((Short)(((Short)order)[i] & 32 ? b : a))[((Short)order)[i] & 31]);
}
// Halves, then halves of them, as GCC and Clang have it.
template <class V, class Op>
EMULATED auto reduced(V x, Op op) -> decltype(x[0] + 0) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = op(x[i], x[i + n]);
  return x[0];
}
EMULATED float reduce_add_ps(F a) {
  return reduced(a, [](float x, float y) { return x + y; });
}
EMULATED float reduce_max_ps(F a) {
  return reduced(a, [](float x, float y) { return x > y ? x : y; });
}
EMULATED int32_t reduce_add_epi32(I a) {
  return int32_t(reduced((Word)a, [](uint32_t x, uint32_t y) { return x + y; }));
}

// AVX512_BF16 takes numbers below 2^-126 for 0, and makes 0 of them.
EMULATED float normal(float x) { return (bits_of<uint32_t>(x) & 0x7f800000) ? x : 0 * x; }
EMULATED uint16_t rounded(float x) {
  const uint32_t u = bits_of<uint32_t>(normal(x));
  if (x != x) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u << 1 ? u + 0x7fff + (u >> 16 & 1) : u) >> 16);
}
EMULATED __m256i cvtneps_pbh(F a) { return (__m256i)EACH(16, __v16hi, int16_t(rounded(a[i]))); }
EMULATED I cvtne2ps_pbh(F high, F low) { return join<I>(cvtneps_pbh(low), cvtneps_pbh(high)); }
EMULATED F dpbf16_ps(F c, __m512bh a, __m512bh b) {
  auto number = [](uint32_t bits) { return normal(bits_of<float>(bits)); };
  const Word x = bits_of<Word>(a), y = bits_of<Word>(b);
  return EACH(16, F, ({
                const float odd = __builtin_fmaf(number(x[i] & 0xffff0000), number(y[i] & 0xffff0000), normal(c[i]));
                normal(__builtin_fmaf(number(x[i] << 16), number(y[i] << 16), normal(odd)));
              }));
}
EMULATED I dpbusd_epi32(I c, I a, I b) {
  const Byte x = bits_of<Byte>(a);
  const Char y = bits_of<Char>(b);
  return (I)EACH(16, Word, ({
                   int32_t sum = 0;
                   for (int j = 4 * i; j < 4 * i + 4; ++j) sum += int32_t(x[j]) * y[j];
                   ((Word)c)[i] + uint32_t(sum);
                 }));
}

#undef EACH
#undef BY_HALVES
#undef EMULATED
}  // namespace
}  // namespace emulated

#undef _mm512_abs_ps
#define _mm512_abs_ps emulated::abs_ps
#undef _mm512_add_epi16
#define _mm512_add_epi16 emulated::add_epi16
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated::add_epi32
#undef _mm512_add_ps
#define _mm512_add_ps emulated::add_ps
#undef _mm512_and_si512
#define _mm512_and_si512 emulated::and_si512
#undef _mm512_castpd_ps
#define _mm512_castpd_ps emulated::castpd_ps
#undef _mm512_castps_pd
#define _mm512_castps_pd emulated::castps_pd
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated::castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated::castsi512_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated::cvtps_ph
#undef _mm512_div_ps
#define _mm512_div_ps emulated::div_ps
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_fpclass_ps_mask
#define _mm512_fpclass_ps_mask emulated::fpclass_ps_mask
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated::loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated::loadu_si512
#undef _mm512_mask_blend_epi32
#define _mm512_mask_blend_epi32 emulated::mask_blend_epi32
#undef _mm512_mask_blend_ps
#define _mm512_mask_blend_ps emulated::mask_blend_ps
#undef _mm512_mask_mov_epi32
#define _mm512_mask_mov_epi32 emulated::mask_mov_epi32
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#undef _mm512_maskz_mov_ps
#define _mm512_maskz_mov_ps emulated::maskz_mov_ps
#undef _mm512_max_ps
#define _mm512_max_ps emulated::max_ps
#undef _mm512_min_ps
#define _mm512_min_ps emulated::min_ps
#undef _mm512_mul_epu32
#define _mm512_mul_epu32 emulated::mul_epu32
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated::mul_ps
#undef _mm512_permute_ps
#define _mm512_permute_ps emulated::permute_ps
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16 emulated::permutex2var_epi16
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 emulated::set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::set1_epi32
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 emulated::set1_epi8
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::set1_ps
#undef _mm512_set_epi16
#define _mm512_set_epi16 emulated::set_epi16
#undef _mm512_setr_ps
#define _mm512_setr_ps emulated::setr_ps
#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated::setzero_ps
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 emulated::setzero_si512
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#undef _mm512_sll_epi32
#define _mm512_sll_epi32 emulated::sll_epi32
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_slli_epi64
#define _mm512_slli_epi64 emulated::slli_epi64
#undef _mm512_sqrt_ps
#define _mm512_sqrt_ps emulated::sqrt_ps
#undef _mm512_srai_epi32
#define _mm512_srai_epi32 emulated::srai_epi32
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated::srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#undef _mm512_srli_epi64
#define _mm512_srli_epi64 emulated::srli_epi64
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#undef _mm512_stream_ps
#define _mm512_stream_ps emulated::stream_ps
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#undef _mm512_sub_ps
#define _mm512_sub_ps emulated::sub_ps
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 emulated::ternarylogic_epi32
#undef _mm512_unpackhi_pd
#define _mm512_unpackhi_pd emulated::unpackhi_pd
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps emulated::unpackhi_ps
#undef _mm512_unpacklo_pd
#define _mm512_unpacklo_pd emulated::unpacklo_pd
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps emulated::unpacklo_ps
#undef _mm512_xor_si512
#define _mm512_xor_si512 emulated::xor_si512
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16_256
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16_256
#undef _mm_maskz_loadu_epi8
#define _mm_maskz_loadu_epi8 emulated::maskz_loadu_epi8_128
