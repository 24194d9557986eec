// shrank::gated_backward (schema and law: shrank/ops/gated_backward.py).
#pragma once

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "runtime.h"
#include "tensors.h"

namespace shrank {

struct GatedBackward {
  const Tensor& grad;
  const Tensor& gate_h;
  const Tensor& gate_up;
  const std::optional<Tensor>& gate_bias;
  const Tensor& h;
  const Tensor& up;
  const std::optional<Tensor>& bias;
  std::string_view activation;
  bool needs_gate_bias, needs_bias;
};

// The gradients of the gate before its activation, of the value, and of either bias, which is empty unless it is needed.
using GatedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

GatedGradients gated_backward(const GatedBackward& args, const Runtime& runtime);

// By the kernel that is named, on the tile that is named, or an error that says why not.
GatedGradients gated_backward_as(const GatedBackward& args, std::string_view kernel, const std::vector<int64_t>& grid,
                                 const Runtime& runtime);

// Registers both for one dispatch key: `runtime` is a constexpr Runtime.
#define SHRANK_IMPL_GATED_BACKWARD(library, runtime)                                                                   \
  library.impl("gated_backward", TORCH_BOX((&::shrank::boxed::gated_backward<&runtime>)));                             \
  library.impl("gated_backward_as", TORCH_BOX((&::shrank::boxed::gated_backward_as<&runtime>)))

namespace boxed {

template <const Runtime* runtime>
GatedGradients gated_backward(const Tensor& grad, const Tensor& gate_h, const Tensor& gate_up,
                              const std::optional<Tensor>& gate_bias, const Tensor& h, const Tensor& up,
                              const std::optional<Tensor>& bias, std::string_view activation, bool needs_gate_bias,
                              bool needs_bias) {
  return shrank::gated_backward(
      {grad, gate_h, gate_up, gate_bias, h, up, bias, activation, needs_gate_bias, needs_bias}, *runtime);
}

template <const Runtime* runtime>
GatedGradients gated_backward_as(const Tensor& grad, const Tensor& gate_h, const Tensor& gate_up,
                                 const std::optional<Tensor>& gate_bias, const Tensor& h, const Tensor& up,
                                 const std::optional<Tensor>& bias, std::string_view activation, bool needs_gate_bias,
                                 bool needs_bias, std::string_view kernel, const std::vector<int64_t>& grid) {
  return shrank::gated_backward_as(
      {grad, gate_h, gate_up, gate_bias, h, up, bias, activation, needs_gate_bias, needs_bias}, kernel, grid, *runtime);
}

}  // namespace boxed
}  // namespace shrank
