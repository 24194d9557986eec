// The tensor cores, by warp: arch/matrix.cuh.
#pragma once

#include "../arch/matrix.cuh"
#include "shared.cuh"

namespace shrank::conformance {

// Row r of matrix m is chunk 8 m + r; the addresses that the lanes pass are those of arch/matrix.cuh.
struct LoadMatrices : Case<Inputs::bits, kWarp, kWarpWords, kWarpWords, kWarpBytes> {
  SHRANK_DEVICE static void run(const Params& params) {
    fill_shared(params, kWarpWords);
    const int lane = arch::lane_index();
    uint32_t fragment[4];
    arch::load_matrices(fragment, arch::dynamic_shared() + lane * 16);
    for (int i = 0; i < 4; i++) words_out(params)[lane * 4 + i] = fragment[i];
  }
};

struct LoadMatricesTransposed : Case<Inputs::bits, kWarp, kWarpWords, kWarpWords, kWarpBytes> {
  SHRANK_DEVICE static void run(const Params& params) {
    fill_shared(params, kWarpWords);
    const int lane = arch::lane_index();
    uint32_t fragment[4];
    arch::load_matrices_transposed(fragment, arch::dynamic_shared() + lane * 16);
    for (int i = 0; i < 4; i++) words_out(params)[lane * 4 + i] = fragment[i];
  }
};

// A lane's input: four words of a, two of b, and two with the four numbers to which the sums are added.
template <typename T> struct MultiplyAdd : Case<kFactors<T>, kWarp, kWarp * 8, kWarp * 4> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int lane = arch::lane_index();
    const uint32_t* from = words_in(params) + lane * 8;
    const T* sums = reinterpret_cast<const T*>(from + 6);
    const uint32_t a[4] = {from[0], from[1], from[2], from[3]};
    float sum[4];
    for (int i = 0; i < 4; i++) sum[i] = arch::widen(sums[i]);
    arch::multiply_add<T>(sum, a, from[4], from[5]);
    for (int i = 0; i < 4; i++) output<float>(params)[lane * 4 + i] = sum[i];
  }
};

}  // namespace shrank::conformance
