// Packed weights with VPDPBUSD, which multiplies 4 unsigned by 4 signed bytes in each of 16 lanes and adds the products
// to a 32-bit sum, exactly: weights are the unsigned side as they lie, and x is split into two or three signed planes,
// x = scale * (256 * (256 * high + middle) + low). A scale per step leaves an error of at most 2^-16 (two planes) or
// 2^-24 (three) of the largest number of the step.

template <class V>
void prepare(const WeightOnly& a, void* memory) {
  Arena arena{(char*)memory, 0};
  const Prepared p(a, arena);
  const int32_t zero = a.bits == 8 ? 128 : 8;
  const float limit = a.planes == 2 ? 32639.0f : 8355700.0f;  // 127 in every plane, less what rounding may add
  for (int64_t m = 0; m < a.M; ++m)
    for (int64_t s = 0; s < p.steps; ++s) {
      const int64_t place = m * p.steps + s, vectors = p.step / 16;
      int8_t* to = p.planes + place * a.planes * p.step;
      __m512 x[4], largest = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
      __mmask16 wild = 0;  // infinities and NaN
      for (int64_t v = 0; v < vectors; ++v) {
        x[v] = Vec::load(a.x + m * a.x_row + s * p.step + v * 16, a.K - s * p.step - v * 16).v;
        largest = _mm512_max_ps(largest, _mm512_abs_ps(x[v]));
        sum = _mm512_add_ps(sum, x[v]);
        wild |= _mm512_fpclass_ps_mask(x[v], 0x99);
      }
      const float most = _mm512_reduce_max_ps(largest);
      const bool tiny = !(most > 1e-30f);  // limit / most would overflow; such a step is 0
      p.scale[place] = wild ? NAN : tiny ? 0.0f : most / limit;
      p.sum[place] = _mm512_reduce_add_ps(sum);
      const __m512 inverse = _mm512_set1_ps(tiny || wild ? 0.0f : limit / most);
      __m512i plane_sum[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t v = 0; v < vectors; ++v) {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(wild ? _mm512_setzero_ps() : x[v], inverse));
        for (int64_t plane = a.planes - 1; plane >= 0; --plane) {  // the lowest first, rounding what is above it
          const __m512i above =
              plane ? _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8) : _mm512_setzero_si512();
          const __m512i digit = _mm512_sub_epi32(q, _mm512_slli_epi32(above, 8));
          _mm_storeu_si128((__m128i*)(to + plane * p.step + v * 16), _mm512_cvtepi32_epi8(digit));
          plane_sum[plane] = _mm512_add_epi32(plane_sum[plane], digit);
          q = above;
        }
      }
      for (int64_t plane = 0; plane < a.planes; ++plane)
        p.start[place * a.planes + plane] = -zero * _mm512_reduce_add_epi32(plane_sum[plane]);
    }
}

inline __m512i four_bytes(const int8_t* p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return _mm512_set1_epi32(bits);
}

template <int kBits, int P, int C>
inline void panel_planes(const WeightOnly& a, const Prepared& p, int64_t panel, int64_t m) {
  constexpr int kChains = C == 1 ? 2 : 1;
  constexpr int64_t kAhead = 4096;  // bytes; a panel is one stream
  const char* w = (const char*)panel_words<kBits>(a, panel);
  const __m512i low_half = _mm512_set1_epi8(15);
  const int64_t steps_per_group = a.group / p.step, groups = p.steps / steps_per_group;
  Vec y[C];
  UNROLLED for (int c = 0; c < C; ++c) y[c] = Vec::set(0);
  for (int64_t s = 0; s < p.steps; ++s) {
    __m512i sum[C][P][kChains];
    const int8_t* planes[C];
    UNROLLED for (int c = 0; c < C; ++c) {
      const int64_t place = (m + c) * p.steps + s;
      planes[c] = p.planes + place * P * p.step;
      UNROLLED for (int i = 0; i < P; ++i) {
        sum[c][i][0] = _mm512_set1_epi32(p.start[place * P + i]);
        if (kChains == 2) sum[c][i][kChains - 1] = _mm512_setzero_si512();
      }
    }
    for (int64_t k = 0; k < p.step; k += 8) {  // 8 numbers of each row: two vectors of 4
      __m512i v[2];
      v[0] = _mm512_loadu_si512(w);
      PREFETCH(w + kAhead);
      if (kBits == 8) {
        v[1] = _mm512_loadu_si512(w + 64);
        PREFETCH(w + kAhead + 64);
      } else {
        v[1] = _mm512_and_si512(_mm512_srli_epi16(v[0], 4), low_half);
        v[0] = _mm512_and_si512(v[0], low_half);
      }
      w += kBits * 16;
      UNROLLED for (int c = 0; c < C; ++c) UNROLLED for (int i = 0; i < P; ++i) UNROLLED for (int u = 0; u < 2; ++u) {
        __m512i& to = sum[c][i][u * (kChains - 1)];
        to = _mm512_dpbusd_epi32(to, v[u], four_bytes(planes[c] + i * p.step + k + 4 * u));
      }
    }
    const int64_t at = (panel * groups + s / steps_per_group) * kPanel;
    const Vec scale = per_row<kBits, Vec>(a.scales, at);
    UNROLLED for (int c = 0; c < C; ++c) {
      const int64_t place = (m + c) * p.steps + s;
      Vec f = Vec::set(0);
      UNROLLED for (int i = 0; i < P; ++i) {
        const __m512i total = kChains == 2 ? _mm512_add_epi32(sum[c][i][0], sum[c][i][kChains - 1]) : sum[c][i][0];
        const Vec plane = {_mm512_cvtepi32_ps(total)};
        f = i ? fma(f, Vec::set(256), plane) : plane;
      }
      y[c] = fma(f * Vec::set(p.scale[place]), scale, y[c]);
      if (a.offsets) y[c] = fma(per_row<kBits, Vec>(a.offsets, at), Vec::set(p.sum[place]), y[c]);
    }
  }
  UNROLLED for (int c = 0; c < C; ++c) write(a, y[c], m + c, panel * kPanel);
}
template <int kBits, int C, class V>
void panel_rows(const WeightOnly& a, const Prepared& p, int64_t panel, int64_t m) {
  a.planes == 2 ? panel_planes<kBits, 2, C>(a, p, panel, m) : panel_planes<kBits, 3, C>(a, p, panel, m);
}
