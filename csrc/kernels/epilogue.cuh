// Each thread owns one pack of columns and strides over the rows.
#pragma once

#include <type_traits>

#include "../arch/position.cuh"
#include "activation.cuh"
#include "epilogue.h"

namespace shrank {

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
      for (int i = 0; i < Count; i++) y.item[i] = arch::round_to<T>(activate<T, kind>(z[i]) + residual[i]);
      arch::store<T, Count>(static_cast<T*>(params.y) + offset, y);
    }
  }

  SHRANK_DEVICE static void widen(const Pack& pack, C (&out)[Count]) {
    for (int i = 0; i < Count; i++) out[i] = arch::widen(pack.item[i]);
  }
};

// Calls visit with the Epilogue that the parameters and the tile name.
template <typename Visit> void with_epilogue(const EpilogueParams& params, const EpilogueTile& tile, Visit visit) {
  const auto with_kernel = [&](auto element, auto count) {
    with_activation(params.activation, [&](auto kind) {
      visit(Epilogue<decltype(element), decltype(count)::value, decltype(kind)::value>{});
    });
  };
  const auto with_count = [&](auto element) {
    constexpr int widest = 16 / sizeof(element);
    if (tile.vector == 1) with_kernel(element, std::integral_constant<int, 1>{});
    else with_kernel(element, std::integral_constant<int, widest>{});
  };
  switch (params.dtype) {
    case Dtype::float32: return with_count(float{});
    case Dtype::float16: return with_count(arch::float16{});
    case Dtype::bfloat16: return with_count(arch::bfloat16{});
    case Dtype::float64: return with_count(double{});
  }
}

}  // namespace shrank
