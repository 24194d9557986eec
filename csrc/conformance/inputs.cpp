#include "inputs.h"

#include <cstring>

namespace shrank::conformance {
namespace {

// splitmix64 (Steele, Lea, Flood 2014)
class Random {
 public:
  uint32_t word() {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
  }
  uint32_t below(uint32_t bound) { return word() % bound; }
  float between(float low, float high) { return low + (high - low) * (static_cast<float>(word() >> 8) * 0x1p-24f); }

 private:
  uint64_t state_ = 2026;
};

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Zeros, subnormals, the largest, infinities and NaNs of both half types, two to a word.
const std::vector<uint32_t> kHalves = {0x80000000u, 0x80010001u, 0x040003ffu, 0x840083ffu, 0x7c007bffu, 0xfc00fbffu,
                                       0x7e007c01u, 0xffff7fffu, 0x007f0080u, 0x807f8080u, 0x7f807f7fu, 0xff80ff7fu,
                                       0x7fc07f81u, 0xffc0ff81u, 0x3c003f80u, 0xbc00bf80u};

// Where rounding to a half type is special: halves between two neighbours, to even and to odd, the last number that
// does not overflow and the first that does, subnormals, infinities and NaNs.
const std::vector<uint32_t> kFloats = {
    0x00000000u, 0x80000000u, 0x00000001u, 0x007fffffu, 0x00008000u, 0x00018000u, 0x80008001u, 0x00800000u,
    0x3f808000u, 0x3f818000u, 0x3f808001u, 0x3f801000u, 0x3f803000u, 0x3f801001u, 0xbf807fffu, 0xbf800fffu,
    0x477fe000u, 0x477fefffu, 0x477ff000u, 0xc77ff000u, 0x33000000u, 0x33000001u, 0x33800000u, 0x33c00000u,
    0x38800000u, 0x387fffffu, 0x387fe000u, 0x387ff000u, 0x7f7fffffu, 0x7f7f7fffu, 0x7f7f8000u, 0xff7f8000u,
    0x7f800000u, 0xff800000u, 0x7f800001u, 0xff800001u, 0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0x7fc12345u};

// 0, infinity, NaN: exact also where the instruction approximates.
const std::vector<uint32_t> kExact = {0x00000000u, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u};

const std::vector<uint32_t>& special(Inputs kind) {
  static const std::vector<uint32_t> none;
  switch (kind) {
    case Inputs::halves: return kHalves;
    case Inputs::floats: return kFloats;
    case Inputs::exponents:
    case Inputs::divisors: return kExact;
    default: return none;
  }
}

// With a biased exponent in [low, high).
uint32_t sized(Random& random, uint32_t low, uint32_t high) {
  return (random.word() & 0x807fffffu) | (low + random.below(high - low)) << 23;
}

// Any bits; exponents that float16 has; and of those, halves between two float16 and between two bfloat16.
uint32_t float_to_round(Random& random, int i) {
  if (i % 4 == 0) return random.word();
  const uint32_t value = sized(random, 101, 144);
  return i % 4 == 1 ? value : i % 4 == 2 ? (value & ~0x1fffu) | 0x1000u : (value & ~0xffffu) | 0x8000u;
}

uint32_t factor_pair(Random& random, int fraction_bits, uint32_t bias) {
  const auto half = [&] {
    const uint32_t fraction = random.word() & ((1u << fraction_bits) - 1);
    return (random.word() & 0x8000u) | (bias - random.below(7)) << fraction_bits | fraction;
  };
  const uint32_t low = half();
  return low | half() << 16;
}

uint32_t draw(Inputs kind, Random& random, int i) {
  switch (kind) {
    case Inputs::floats: return float_to_round(random, i);
    case Inputs::exponents: return bits_of(random.between(-125.0f, 127.0f));  // no subnormal result: it becomes 0
    case Inputs::divisors: return sized(random, 2, 252);
    case Inputs::bfloat16: return factor_pair(random, 7, 127);
    case Inputs::float16: return factor_pair(random, 10, 15);
    default: return random.word();
  }
}

}  // namespace

std::vector<uint32_t> inputs_of(Inputs kind, int words) {
  Random random;
  std::vector<uint32_t> inputs = special(kind);
  inputs.resize(static_cast<std::size_t>(words));
  for (int i = static_cast<int>(special(kind).size()); i < words; i++) inputs[i] = draw(kind, random, i);
  return inputs;
}

}  // namespace shrank::conformance
