// The half types on a host, bit for bit as PTX cvt.rn rounds them (PTX ISA, "cvt").
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace shrank::emulator {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline uint16_t round_to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float widen_float16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return exponent ? sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25)
                  : sign * std::ldexp(static_cast<float>(fraction), -24);
}

inline uint16_t round_to_float16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // half-way to the number after the largest
  int exponent;
  std::frexp(magnitude, &exponent);
  // Units of the last place: 2^-24 for subnormals, else 11 significant bits. nearbyint rounds halves to even.
  const int unit = exponent - 11 > -24 ? exponent - 11 : -24;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // Adding the units to the exponent field lets a carry of the rounding move into the exponent.
  return static_cast<uint16_t>(sign | (((unit + 24) << 10) + units));
}

}  // namespace shrank::emulator
