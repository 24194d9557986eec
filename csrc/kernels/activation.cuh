// The activations, on the number before they are rounded to T.
#pragma once

#include <cmath>
#include <type_traits>

#include "../arch/scalar.cuh"
#include "../select/vocabulary.h"

namespace shrank {

// As exact as T needs. The GPU computes its own tanh to 2^-11 of the value in one instruction: an eighth of bfloat16's
// last place, but half of float16's.
template <typename T> SHRANK_DEVICE arch::compute_t<T> tanh_for(arch::compute_t<T> x) {
  if constexpr (std::is_same_v<T, arch::bfloat16>) return arch::tanh_approximate(x);
  else if constexpr (std::is_same_v<T, arch::float16>) {
    constexpr float two_over_log_2 = 2.88539008177792681f;
    return 1 - 2 * arch::reciprocal_approximate(1 + arch::exp2_approximate(two_over_log_2 * x));
  } else return std::tanh(x);
}

template <typename T, Activation kind> SHRANK_DEVICE arch::compute_t<T> activate(arch::compute_t<T> z) {
  using C = arch::compute_t<T>;
  constexpr C half = C(0.5);
  if constexpr (kind == Activation::relu) return z < 0 ? C(0) : z;  // not fmax: NaN stays NaN, as in PyTorch
  if constexpr (kind == Activation::gelu) return half * z * (1 + std::erf(z * C(0.70710678118654752440)));
  if constexpr (kind == Activation::gelu_tanh) {
    constexpr C root_two_over_pi = C(0.79788456080286535588), cubic = C(0.044715);
    return half * z * (1 + tanh_for<T>(root_two_over_pi * (z + cubic * z * z * z)));
  }
  if constexpr (kind == Activation::silu) {
    if constexpr (sizeof(T) > 2) return z / (1 + std::exp(-z));
    return half * z * (1 + tanh_for<T>(half * z));  // 1 / (1 + e^-z), by its tanh
  }
  return z;
}

// Calls visit with the activation as a type: on a device from a kernel, on the host to choose one.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <typename Visit> SHRANK_BOTH void with_activation(Activation kind, const Visit& visit) {
  switch (kind) {
    case Activation::none: return visit(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu: return visit(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu: return visit(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh: return visit(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::silu: return visit(std::integral_constant<Activation, Activation::silu>{});
  }
}

}  // namespace shrank
