// Random words for dropout: they depend on a place and a seed alone, so that forward and backward, on any backend,
// agree.

// Unsigned words, a register of them. product(a, m, high) is the low halves of a * m: what a compiler makes of 64-bit
// products in a loop takes ten times as long.
struct Word1 {
  static constexpr int L = 1;
  uint32_t v;
  static Word1 set(uint32_t x) { return {x}; }
  static Word1 load(const uint32_t* p) { return {*p}; }
  void store(uint32_t* p) const { *p = v; }
};
inline Word1 xor3(Word1 a, Word1 b, Word1 c) { return {a.v ^ b.v ^ c.v}; }
inline Word1 product(Word1 a, uint32_t m, Word1& high) {
  const uint64_t p = uint64_t(m) * a.v;
  high = {uint32_t(p >> 32)};
  return {uint32_t(p)};
}

#if defined(__AVX512F__)
struct WordVec {
  static constexpr int L = 16;
  __m512i v;
  static WordVec set(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
  static WordVec load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
};
inline WordVec xor3(WordVec a, WordVec b, WordVec c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x96)}; }
inline WordVec product(WordVec a, uint32_t m, WordVec& high) {
  const __m512i factor = _mm512_set1_epi32(int(m));
  const __m512i even = _mm512_mul_epu32(a.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  high = {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
  return {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
}
#elif defined(__AVX2__)
struct WordVec {
  static constexpr int L = 8;
  __m256i v;
  static WordVec set(uint32_t x) { return {_mm256_set1_epi32(int(x))}; }
  static WordVec load(const uint32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
  void store(uint32_t* p) const { _mm256_storeu_si256((__m256i*)p, v); }
};
inline WordVec xor3(WordVec a, WordVec b, WordVec c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }
inline WordVec product(WordVec a, uint32_t m, WordVec& high) {
  const __m256i factor = _mm256_set1_epi32(int(m));
  const __m256i even = _mm256_mul_epu32(a.v, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), factor);
  high = {_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)};
  return {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
}
#else
using WordVec = Word1;
#endif

template <class U, int N>
inline void philox_with(uint32_t (*x)[N], uint64_t seed) {
  for (int i = 0; i < N; i += U::L) {
    U a = U::load(x[0] + i), b = U::load(x[1] + i), c = U::load(x[2] + i), d = U::load(x[3] + i);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 7; ++round) {
      U a_high, c_high;
      const U a_low = product(a, 0xD2511F53u, a_high), c_low = product(c, 0xCD9E8D57u, c_high);
      a = xor3(c_high, b, U::set(k0)), b = c_low;
      c = xor3(a_high, d, U::set(k1)), d = a_low;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    a.store(x[0] + i), b.store(x[1] + i), c.store(x[2] + i), d.store(x[3] + i);
  }
}

// Philox4x32-7 (Salmon et al. 2011) of N counters: x[0..3][i] is a counter of four words and becomes four random ones.
template <int N>
inline void philox(uint32_t (*x)[N], uint64_t seed) {
  if constexpr (N % WordVec::L == 0)
    philox_with<WordVec>(x, seed);
  else
    philox_with<Word1>(x, seed);
}

inline uint32_t dropout_threshold(double dropout_p) { return uint32_t(dropout_p * 4294967296.0); }
