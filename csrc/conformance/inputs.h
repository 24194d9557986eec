// What the instructions are tried on: the same bits on every machine, from the kind of number and a fixed seed.
#pragma once

#include <cstdint>
#include <vector>

namespace shrank::conformance {

// bfloat16 and float16: pairs of numbers between 1/64 and 2 in size, for products.
enum class Inputs { bits, halves, floats, exponents, divisors, bfloat16, float16 };

std::vector<uint32_t> inputs_of(Inputs kind, int words);

}  // namespace shrank::conformance
