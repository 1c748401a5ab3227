// Vec as 16 floats in one AVX-512 register.

struct Vec {
  using T = float;
  static constexpr int L = 16, kChains = 4;
  __m512 v;

  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec iota() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
  static __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1); }
  static __m512 widen16(__m256i x, const bf16*) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static __m512 widen16(__m256i x, const half*) { return _mm512_cvtph_ps(x); }
  static Vec load(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
  }
  static Vec load(const uint8_t* p, int64_t n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
  }
  static Vec load(const double* p, int64_t n = 16) {  // only biases are ever narrowed: lane by lane
    float lanes[16] = {};
    for (int64_t i = 0; i < 16 && i < n; ++i) lanes[i] = float(p[i]);
    return load(lanes);
  }

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  template <class S>
  static Vec load(const S* p) {
    return {widen16(_mm256_loadu_si256((const __m256i*)p), p)};
  }
  template <class S>
  static Vec load(const S* p, int64_t n) {
    return {widen16(_mm256_maskz_loadu_epi16(first(n), p), p)};
  }

  // The signed number of kBits bits that `left` zeros push to the top of each packed word (weight_only.inl).
  template <int kBits>
  static Vec field(const int32_t* p, int left) {
    const __m512i zero = _mm512_set1_epi32(kBits == 8 ? int32_t(0x80808080) : int32_t(0x88888888));
    const __m512i top = _mm512_sll_epi32(_mm512_xor_si512(_mm512_loadu_si512(p), zero), _mm_cvtsi32_si128(left));
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(top, 32 - kBits))};
  }

  __m256i narrow16(const half*) const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#if defined(__AVX512BF16__)  // the same but for numbers below 2^-126, which become 0
  __m256i narrow16(const bf16*) const { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
  __m256i narrow16(const bf16*) const {  // round to nearest even; a NaN stays one
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
  }
#endif
  // Past the caches, to a vector's boundary.
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  template <class S>
  void stream(S* p) const {
    _mm256_stream_si256((__m256i*)p, narrow16(p));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  template <class S>
  void store(S* p) const {
    _mm256_storeu_si256((__m256i*)p, narrow16(p));
  }
  template <class S>
  void store(S* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, first(n), narrow16(p));
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline Vec zero_below(Vec a, Vec b, Vec x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), x.v)};
}
inline Vec rounded(Vec x) {
#if defined(__GNUC__) && !defined(FASTLLM_SPARE)
  asm("" : "+v"(x.v));
#endif
  return x;
}
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec swap_neighbours(Vec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float max_of(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec scale_by_power_of_two(Vec x, Vec n_plus_magic) {
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_slli_epi32(_mm512_castps_si512(n_plus_magic.v), 23)))};
}

inline void transpose(Vec* r) {  // 16 x 16 in place: pairs of rows, then of pairs, then of quarters
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  __m512 u[16];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + 2 + j]);
      u[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline Vec pairs_summed(Vec a, Vec b) {  // in every quarter: a0 + a2, b0 + b2, a1 + a3, b1 + b3
  return {_mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v))};
}
inline Vec quarters_summed(Vec a, Vec b) {  // of pairs_summed
  const __m512d x = _mm512_castps_pd(a.v), y = _mm512_castps_pd(b.v);
  return {_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)))};
}
inline Vec lanes_folded(Vec a, Vec b) {
  return {_mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x88), _mm512_shuffle_f32x4(a.v, b.v, 0xdd))};
}
inline Vec sum_each(const Vec* r) {  // lane i is the sum of r[i]: half the shuffles of a transposition
  Vec u[4];
  UNROLLED for (int i = 0; i < 4; ++i) u[i] =
      quarters_summed(pairs_summed(r[4 * i], r[4 * i + 1]), pairs_summed(r[4 * i + 2], r[4 * i + 3]));
  return lanes_folded(lanes_folded(u[0], u[1]), lanes_folded(u[2], u[3]));
}
