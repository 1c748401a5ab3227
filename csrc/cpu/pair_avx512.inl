// A word of two bf16, for products with VDPBF16PS: c + a[0] * b[0] + a[1] * b[1] in fp32, 16 lanes at once.

struct Pair {
  uint32_t bits;
};
inline Pair pair_of(bf16 low, bf16 high) { return {low.bits | uint32_t(high.bits) << 16}; }

template <>
struct Words<Vec, Pair> {
  static constexpr int kPer = 2;
  using Vector = __m512i;
  static Vector broadcast(const Pair* p) {
    int32_t bits;  // the operand may be a bf16 tensor, aligned to two bytes only
    memcpy(&bits, p, 4);
    return _mm512_set1_epi32(bits);
  }
  static Vector load(const Pair* p) { return _mm512_loadu_si512(p); }
  static Vec dot(Vector a, Vector b, Vec c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a, (__m512bh)b)}; }
};

// Lane i of the words is (low[i], high[i]), rounded to nearest even.
inline void store_pairs(Vec low, Vec high, Pair* to) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

// Words (a[i], b[i]) of the first n of 32 elements in two rows, zeros past them.
inline void load_row_pairs(const bf16* a, const bf16* b, int64_t n, __m512i* words) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  __m512i x, y;
  if (n >= 32) {
    x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  } else {
    const __mmask32 inside = (1u << n) - 1;
    x = _mm512_maskz_loadu_epi16(inside, a), y = _mm512_maskz_loadu_epi16(inside, b);
  }
  words[0] = _mm512_permutex2var_epi16(x, low, y);
  words[1] = _mm512_permutex2var_epi16(x, high, y);
}
