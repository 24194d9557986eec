// The activations, on the number before they are rounded to T.
#pragma once

#include <cmath>
#include <type_traits>

#include "../arch/scalar.cuh"
#include "../select/vocabulary.h"

namespace shrank {

// z where it is above 0, else 0; NaN stays NaN, as in PyTorch, which fmax would drop.
SHRANK_DEVICE float positive_part(float z) { return arch::max_or_nan(z, 0); }
SHRANK_DEVICE double positive_part(double z) { return z < 0 ? 0 : z; }

// z / (1 + 2^x).
SHRANK_DEVICE float over_one_plus_exp2(float z, float x) {
  return z * arch::reciprocal_approximate(1 + arch::exp2_approximate(x));
}

// gelu(z) = max(z, 0) - u P(u) with u = |z| and P(u) = erfc(u / sqrt 2) / 2, the normal distribution's tail. log2 of P is
// smooth: a polynomial of degree 5, fitted to the least largest error of u P(u) in [0, 10], beyond which that is less
// than 1e-22. The result is within 0.35 units of the last place of float16, and 0.18 of bfloat16, before it is rounded;
// tests/csrc/test_activation.py tries every number of both.
SHRANK_DEVICE float gelu_of_16_bits(float z) {
  const float u = fminf(fabsf(z), 10.0f);
  float log2_tail = -0.000320507126f;
  log2_tail = fmaf(log2_tail, u, 0.00582724856f);
  log2_tail = fmaf(log2_tail, u, -0.0482371189f);
  log2_tail = fmaf(log2_tail, u, -0.464121103f);
  log2_tail = fmaf(log2_tail, u, -1.14917576f);
  log2_tail = fmaf(log2_tail, u, -1.00012076f);
  return fmaf(-u, arch::exp2_approximate(log2_tail), positive_part(z));
}

// As exact as T needs: a number of 16 bits has 11 of them at most that count.
template <typename T, Activation kind> SHRANK_DEVICE arch::compute_t<T> activate(arch::compute_t<T> z) {
  using C = arch::compute_t<T>;
  constexpr bool is_16_bits = sizeof(T) == 2;
  constexpr C half = C(0.5), log2_e = C(1.44269504088896340736);
  constexpr C root_two_over_pi = C(0.79788456080286535588), cubic = C(0.044715), scale = -2 * log2_e * root_two_over_pi;
  if constexpr (kind == Activation::relu) return positive_part(z);
  if constexpr (kind == Activation::gelu) {
    if constexpr (is_16_bits) return gelu_of_16_bits(z);
    else return half * z * (1 + std::erf(z * C(0.70710678118654752440)));
  }
  if constexpr (kind == Activation::gelu_tanh) {  // half (1 + tanh t) = 1 / (1 + e^(-2 t))
    if constexpr (is_16_bits) return over_one_plus_exp2(z, z * fmaf(z * z, scale * cubic, scale));
    else return half * z * (1 + std::tanh(root_two_over_pi * (z + cubic * z * z * z)));
  }
  if constexpr (kind == Activation::silu) {
    if constexpr (is_16_bits) return over_one_plus_exp2(z, -log2_e * z);
    else return z / (1 + std::exp(-z));
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
