// Each thread owns one pack of columns and strides over the rows.
#pragma once

#include <cmath>
#include <type_traits>

#include "../arch/position.cuh"
#include "../arch/scalar.cuh"
#include "epilogue.h"

namespace shrank {

template <Activation kind, typename C> SHRANK_DEVICE C activate(C z) {
  constexpr C half = C(0.5);
  if constexpr (kind == Activation::relu) return z < 0 ? C(0) : z;  // not fmax: NaN stays NaN, as in PyTorch
  if constexpr (kind == Activation::gelu) return half * z * (1 + std::erf(z * C(0.70710678118654752440)));
  if constexpr (kind == Activation::gelu_tanh) {
    constexpr C root_two_over_pi = C(0.79788456080286535588), cubic = C(0.044715);
    return half * z * (1 + std::tanh(root_two_over_pi * (z + cubic * z * z * z)));
  }
  if constexpr (kind == Activation::silu) return z / (1 + std::exp(-z));
  return z;
}

template <typename T, int Count, Activation kind> struct Epilogue {
  using C = arch::compute_t<T>;
  using Pack = arch::Pack<T, Count>;

  SHRANK_DEVICE static void run(const EpilogueParams& params, const arch::Position& at) {
    const int64_t column = at.column * Count;
    if (column >= params.N) return;
    for (int64_t row = at.row; row < params.M; row += at.rows) {
      const int64_t offset = row * params.N + column;
      C z[Count], residual[Count] = {};
      widen(arch::load<T, Count>(static_cast<const T*>(params.z) + offset), z);
      if (params.residual) widen(arch::load<T, Count>(static_cast<const T*>(params.residual) + offset), residual);
      Pack y;
      for (int i = 0; i < Count; i++) y.item[i] = arch::round_to<T>(activate<kind>(z[i]) + residual[i]);
      arch::store<T, Count>(static_cast<T*>(params.y) + offset, y);
    }
  }

  SHRANK_DEVICE static void widen(const Pack& pack, C (&out)[Count]) {
    for (int i = 0; i < Count; i++) out[i] = arch::widen(pack.item[i]);
  }
};

// Calls visit with the Epilogue that the parameters and the tile name.
template <typename Visit> void with_epilogue(const EpilogueParams& params, const EpilogueTile& tile, Visit visit) {
  const auto with_activation = [&](auto element, auto count) {
    using T = decltype(element);
    constexpr int Count = decltype(count)::value;
    switch (params.activation) {
      case Activation::none: return visit(Epilogue<T, Count, Activation::none>{});
      case Activation::relu: return visit(Epilogue<T, Count, Activation::relu>{});
      case Activation::gelu: return visit(Epilogue<T, Count, Activation::gelu>{});
      case Activation::gelu_tanh: return visit(Epilogue<T, Count, Activation::gelu_tanh>{});
      case Activation::silu: return visit(Epilogue<T, Count, Activation::silu>{});
    }
  };
  const auto with_count = [&](auto element) {
    constexpr int widest = 16 / sizeof(element);
    if (tile.vector == 1) with_activation(element, std::integral_constant<int, 1>{});
    else with_activation(element, std::integral_constant<int, widest>{});
  };
  switch (params.dtype) {
    case Dtype::float32: return with_count(float{});
    case Dtype::float16: return with_count(arch::float16{});
    case Dtype::bfloat16: return with_count(arch::bfloat16{});
    case Dtype::float64: return with_count(double{});
  }
}

}  // namespace shrank
