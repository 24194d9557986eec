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

// P(u) = erfc(u / sqrt 2) / 2, the normal distribution's tail from u in [0, 10] on. Its log2 is smooth: a polynomial of
// degree 5, fitted to the least largest error of u P(u), which is less than 1e-22 beyond.
SHRANK_DEVICE float normal_tail(float u) {
  float log2_tail = -0.000320507126f;
  log2_tail = fmaf(log2_tail, u, 0.00582724856f);
  log2_tail = fmaf(log2_tail, u, -0.0482371189f);
  log2_tail = fmaf(log2_tail, u, -0.464121103f);
  log2_tail = fmaf(log2_tail, u, -1.14917576f);
  log2_tail = fmaf(log2_tail, u, -1.00012076f);
  return arch::exp2_approximate(log2_tail);
}

// gelu(z) = max(z, 0) - u P(u) with u = |z|. The result is within 0.35 units of the last place of float16, and 0.18 of
// bfloat16, before it is rounded; tests/csrc/test_activation.py tries every number of both.
SHRANK_DEVICE float gelu_of_16_bits(float z) {
  const float u = fminf(fabsf(z), 10.0f);
  return fmaf(-u, normal_tail(u), positive_part(z));
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

// The normal distribution's density.
SHRANK_DEVICE float normal_density(float z) {
  constexpr float half_log2_e = 0.721347520444481703680f, log2_of_root_two_pi = 1.32574806473615823840f;
  return arch::exp2_approximate(fmaf(z * z, -half_log2_e, -log2_of_root_two_pi));
}

// grad times the activation's derivative at z. For 16 bits the derivative is within half a unit of the last place, or
// 2^-12 near its zero; tests/csrc/test_activation.py tries every number.
template <typename T, Activation kind>
SHRANK_DEVICE arch::compute_t<T> activate_backward(arch::compute_t<T> grad, arch::compute_t<T> z) {
  using C = arch::compute_t<T>;
  constexpr bool is_16_bits = sizeof(T) == 2;
  constexpr C half = C(0.5), log2_e = C(1.44269504088896340736);
  constexpr C root_two_over_pi = C(0.79788456080286535588), cubic = C(0.044715), scale = -2 * log2_e * root_two_over_pi;
  if constexpr (kind == Activation::relu) return z <= 0 ? 0 : grad;  // of a NaN, grad, as in PyTorch
  if constexpr (kind == Activation::gelu) {  // the distribution + z times its density
    if constexpr (is_16_bits) {
      const float tail = normal_tail(fminf(fabsf(z), 10.0f));
      return grad * fmaf(z, normal_density(z), z > 0 ? 1 - tail : tail);
    } else {
      return grad * (half * (1 + std::erf(z * C(0.70710678118654752440))) +
                     z * std::exp(-half * z * z) * C(0.39894228040143267794));
    }
  }
  if constexpr (kind == Activation::gelu_tanh) {  // s + z s (1 - s) q' with s = 1 / (1 + e^-q) and q = 2 t
    if constexpr (is_16_bits) {
      const float square = fminf(z * z, 100.0f);  // beyond, 1 - s or s is 0
      const float s = over_one_plus_exp2(1, z * fmaf(square, scale * cubic, scale));
      return grad * fmaf(z * s * (1 - s), fmaf(square, 6 * root_two_over_pi * cubic, 2 * root_two_over_pi), s);
    } else {
      const C t = std::tanh(root_two_over_pi * (z + cubic * z * z * z));
      return grad * half * (1 + t + z * (1 - t * t) * root_two_over_pi * (1 + 3 * cubic * z * z));
    }
  }
  if constexpr (kind == Activation::silu) {  // s + z s (1 - s) with s = 1 / (1 + e^-z)
    C s;
    if constexpr (is_16_bits) s = over_one_plus_exp2(1, -log2_e * z);
    else s = 1 / (1 + std::exp(-z));
    return grad * s * (1 + z * (1 - s));
  }
  return grad;
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
