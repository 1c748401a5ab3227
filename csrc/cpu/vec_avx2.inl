// Vec as 8 floats in one AVX register.

struct Vec {
  using T = float;
  static constexpr int L = 8, kChains = 4;
  __m256 v;

  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m256 widen8(__m128i x, const bf16*) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static __m256 widen8(__m128i x, const half*) { return _mm256_cvtph_ps(x); }
  static Vec load(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
  }
  static Vec load(const uint8_t* p, int64_t n) {
    uint8_t lanes[8] = {};
    for (int i = 0; i < 8 && i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  static Vec load(const double* p, int64_t n = 8) {  // only biases are ever narrowed: lane by lane
    float lanes[8] = {};
    for (int64_t i = 0; i < 8 && i < n; ++i) lanes[i] = float(p[i]);
    return load(lanes);
  }

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  template <class S>
  static Vec load(const S* p) {
    return {widen8(_mm_loadu_si128((const __m128i*)p), p)};
  }
  template <class S>
  static Vec load(const S* p, int64_t n) {  // AVX2 has no masked load of 16-bit lanes
    uint16_t lanes[8] = {};
    for (int i = 0; i < 8 && i < n; ++i) lanes[i] = p[i].bits;
    return {widen8(_mm_loadu_si128((const __m128i*)lanes), p)};
  }

  // The signed number of kBits bits that `left` zeros push to the top of each packed word (weight_only.inl).
  template <int kBits>
  static Vec field(const int32_t* p, int left) {
    const __m256i zero = _mm256_set1_epi32(kBits == 8 ? int32_t(0x80808080) : int32_t(0x88888888));
    const __m256i words = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), zero);
    const __m256i top = _mm256_sll_epi32(words, _mm_cvtsi32_si128(left));
    return {_mm256_cvtepi32_ps(_mm256_srai_epi32(top, 32 - kBits))};
  }

  __m128i narrow8(const half*) const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  __m128i narrow8(const bf16*) const {  // round to nearest even; a NaN stays one
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
  // Past the caches, to a vector's boundary.
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  template <class S>
  void stream(S* p) const {
    _mm_stream_si128((__m128i*)p, narrow8(p));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  template <class S>
  void store(S* p) const {
    _mm_storeu_si128((__m128i*)p, narrow8(p));
  }
  template <class S>
  void store(S* p, int64_t n) const {
    uint16_t lanes[8];
    _mm_storeu_si128((__m128i*)lanes, narrow8(p));
    for (int i = 0; i < 8 && i < n; ++i) p[i].bits = lanes[i];
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vec zero_below(Vec a, Vec b, Vec x) { return {_mm256_andnot_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ), x.v)}; }
inline Vec rounded(Vec x) {
#if defined(__GNUC__)
  asm("" : "+x"(x.v));
#endif
  return x;
}
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec swap_neighbours(Vec a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
inline float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
template <int C>
inline double wide_sum(const Vec (&x)[C]) {  // of all lanes
  __m256d low = _mm256_setzero_pd(), high = low;
  UNROLLED for (int u = 0; u < C; ++u) {
    low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(x[u].v)));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(x[u].v, 1)));
  }
  low = _mm256_add_pd(low, high);
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(low), _mm256_extractf128_pd(low, 1));
  return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}
inline float max_of(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline Vec scale_by_power_of_two(Vec x, Vec n_plus_magic) {
  return {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(x.v), _mm256_slli_epi32(_mm256_castps_si256(n_plus_magic.v), 23)))};
}

// How bf16 lies in Two vectors: numbers at even places in one, at odd places in the other. Then 16 are widened by a
// shift and a mask, and rounded together, as halves of 16 bits.
struct EvenOdd {
  static void load(const bf16* p, Vec& even, Vec& odd) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)p);
    even.v = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    odd.v = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int32_t(0xffff0000))));
  }
  static void load(const bf16* p, int64_t n, Vec& even, Vec& odd) {
    bf16 lanes[16] = {};
    for (int i = 0; i < 16 && i < n; ++i) lanes[i] = p[i];
    load(lanes, even, odd);
  }
  static void sort(Vec& a, Vec& b) {
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88));
    const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0xdd));
    a.v = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
    b.v = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
  }
  static void load(const float* p, Vec& even, Vec& odd) {
    even = Vec::load(p), odd = Vec::load(p + 8);
    sort(even, odd);
  }
  static void load(const float* p, int64_t n, Vec& even, Vec& odd) {
    even = Vec::load(p, n), odd = Vec::load(p + 8, n - 8);
    sort(even, odd);
  }

  static __m256i narrow(Vec even, Vec odd) {  // round to nearest even; a NaN stays one
    const __m256i a = _mm256_castps_si256(even.v), b = _mm256_castps_si256(odd.v), one = _mm256_set1_epi16(1);
    const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
    const __m256i low = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
    // Up where the low half is more than half a step, or is that and the high half is odd: where low | odd is above
    // 0x8000, unsigned.
    const __m256i low_or_odd = _mm256_or_si256(low, _mm256_and_si256(high, one));
    const __m256i up = _mm256_cmpgt_epi16(_mm256_xor_si256(low_or_odd, _mm256_set1_epi16(-0x8000)),
                                          _mm256_setzero_si256());  // -1 there
    const __m256i rounded = _mm256_sub_epi16(high, up);
    if (_mm256_movemask_ps(_mm256_cmp_ps(even.v, odd.v, _CMP_UNORD_Q)) == 0) return rounded;
    const __m256i a_nan = _mm256_castps_si256(_mm256_cmp_ps(even.v, even.v, _CMP_UNORD_Q));
    const __m256i b_nan = _mm256_castps_si256(_mm256_cmp_ps(odd.v, odd.v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi16(0x7fc0), _mm256_blend_epi16(a_nan, b_nan, 0xaa));
  }
  static void store(Vec even, Vec odd, bf16* p) { _mm256_storeu_si256((__m256i*)p, narrow(even, odd)); }
  static void stream(Vec even, Vec odd, bf16* p) { _mm256_stream_si256((__m256i*)p, narrow(even, odd)); }
  static void store(Vec even, Vec odd, bf16* p, int64_t n) {
    bf16 lanes[16];
    store(even, odd, lanes);
    for (int i = 0; i < 16 && i < n; ++i) p[i] = lanes[i];
  }
  static void join(Vec& even, Vec& odd) {
    const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
    even.v = _mm256_permute2f128_ps(low, high, 0x20);
    odd.v = _mm256_permute2f128_ps(low, high, 0x31);
  }
  static void store(Vec even, Vec odd, float* p) {
    join(even, odd);
    even.store(p), odd.store(p + 8);
  }
  static void store(Vec even, Vec odd, float* p, int64_t n) {
    join(even, odd);
    even.store(p, n), odd.store(p + 8, n - 8);
  }
  static void inside(Vec& even, Vec& odd, int64_t n, Vec outside) {
    even = select_lt(Vec::iota(), Vec::set(float((n + 1) / 2)), even, outside);
    odd = select_lt(Vec::iota(), Vec::set(float(n / 2)), odd, outside);
  }
};

inline void transpose(Vec* r) {  // 8 x 8 in place: pairs of rows, then of pairs, then halves
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      u[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0x44);
      u[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

inline Vec pairs_summed(Vec a, Vec b) {  // in either half: a0 + a2, b0 + b2, a1 + a3, b1 + b3
  return {_mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v))};
}
inline Vec halves_summed(Vec a, Vec b) {  // of pairs_summed
  return {_mm256_add_ps(_mm256_shuffle_ps(a.v, b.v, 0x44), _mm256_shuffle_ps(a.v, b.v, 0xee))};
}
inline Vec sum_each(const Vec* r) {  // lane i is the sum of r[i]: half the shuffles of a transposition
  Vec u[2];
  UNROLLED for (int i = 0; i < 2; ++i) u[i] =
      halves_summed(pairs_summed(r[4 * i], r[4 * i + 1]), pairs_summed(r[4 * i + 2], r[4 * i + 3]));
  return {_mm256_add_ps(_mm256_permute2f128_ps(u[0].v, u[1].v, 0x20), _mm256_permute2f128_ps(u[0].v, u[1].v, 0x31))};
}
