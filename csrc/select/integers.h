// Sizes as the cost model counts them.
#pragma once

#include <cstdint>

namespace shrank {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr double real(int64_t size) { return static_cast<double>(size); }

}  // namespace shrank
