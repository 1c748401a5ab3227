// bf16 and fp16 as storage types, and their conversions one number at a time.

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(uint8_t x) { return x; }
inline float widen(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float widen(half x) {
  // The exponent is moved by a multiplication, which also makes fp16's subnormals right.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  const float scaled = as_float(magnitude) * as_float(0x77800000);  // 2^112
  return as_float((x.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 | sign : as_bits(scaled) | sign);
}

inline void narrow(float x, float& y) { y = x; }
inline void narrow(double x, double& y) { y = x; }
inline void narrow(float x, bf16& y) {  // round to nearest even; a NaN stays one
  const uint32_t u = as_bits(x);
  y.bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void narrow(float x, half& y) {
  const uint32_t sign = as_bits(x) & 0x80000000u, u = as_bits(x) ^ sign;
  uint32_t h;
  if (u > 0x7f800000) {
    h = 0x7e00;
  } else if (u >= 0x477ff000) {  // 65520 and above round to infinity
    h = 0x7c00;
  } else if (u < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the bottom
    h = as_bits(as_float(u) + 0.5f) - 0x3f000000;
  } else {
    h = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
  }
  y.bits = uint16_t(h | (sign >> 16));
}
