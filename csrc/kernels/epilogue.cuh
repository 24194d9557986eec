// Each thread owns one pack of columns and strides over the rows, forwards and backwards.
#pragma once

#include <type_traits>

#include "../arch/position.cuh"
#include "activation.cuh"
#include "epilogue.h"

namespace shrank {

template <typename T, int Count> SHRANK_DEVICE void widen(const arch::Pack<T, Count>& pack,
                                                          arch::compute_t<T> (&out)[Count]) {
  for (int i = 0; i < Count; i++) out[i] = arch::widen(pack.item[i]);
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
      for (int i = 0; i < Count; i++) y.item[i] = arch::round_to<T>(activate<T, kind>(z[i]) + residual[i]);
      arch::store<T, Count>(static_cast<T*>(params.y) + offset, y);
    }
  }
};

template <typename T, int Count, Activation kind> struct EpilogueBackward {
  using C = arch::compute_t<T>;
  using Pack = arch::Pack<T, Count>;

  SHRANK_DEVICE static void run(const EpilogueBackwardParams& params, const arch::Position& at) {
    const int64_t column = at.column * Count;
    if (column >= params.N) return;
    arch::Pack<C, Count> sums{};
    for (int64_t row = at.row; row < params.M; row += at.rows) {
      const int64_t offset = row * params.N + column;
      C z[Count], grad[Count];
      widen(arch::load<T, Count>(static_cast<const T*>(params.z) + offset), z);
      widen(arch::load<T, Count>(static_cast<const T*>(params.grad) + offset), grad);
      Pack dz;
      for (int i = 0; i < Count; i++) {
        const C item = activate_backward<T, kind>(grad[i], z[i]);
        sums.item[i] += item;
        dz.item[i] = arch::round_to<T>(item);
      }
      arch::store<T, Count>(static_cast<T*>(params.dz) + offset, dz);
    }
    if (!params.sums) return;
    C* const to = static_cast<C*>(params.sums) + at.row * params.N + column;
    for (int i = 0; i < Count; i++) to[i] = sums.item[i];
  }
};

// Calls visit with the Epilogue, or EpilogueBackward, that the parameters and the tile name.
template <template <typename, int, Activation> class Kernel, typename Params, typename Visit>
void with_epilogue(const Params& params, const EpilogueTile& tile, Visit visit) {
  const auto with_kernel = [&](auto element, auto count) {
    with_activation(params.activation, [&](auto kind) {
      visit(Kernel<decltype(element), decltype(count)::value, decltype(kind)::value>{});
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
