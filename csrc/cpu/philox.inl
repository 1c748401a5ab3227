// Random words for dropout: they depend on a place and a seed alone, so that forward and backward, on any backend,
// agree.

// Philox4x32-7 (Salmon et al. 2011) of N counters: x[0..3][i] is a counter of four words and becomes four random ones.
template <int N>
inline void philox(uint32_t (*x)[N], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    for (int i = 0; i < N; ++i) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * x[0][i], p1 = uint64_t(0xCD9E8D57u) * x[2][i];
      x[0][i] = uint32_t(p1 >> 32) ^ x[1][i] ^ k0;
      x[1][i] = uint32_t(p1);
      x[2][i] = uint32_t(p0 >> 32) ^ x[3][i] ^ k1;
      x[3][i] = uint32_t(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

inline uint32_t dropout_threshold(double dropout_p) { return uint32_t(dropout_p * 4294967296.0); }
