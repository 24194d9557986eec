// What the matrix kernels issue: counted in their SASS (nvcc 13.0). tests/csrc/test_sass_loops.py holds those of panels
// and of ends to what is compiled.
#pragma once

#include "linear_tile.h"
#include "vocabulary.h"

namespace shrank {

// A step multiplies a panel of each operand, 64 numbers of 16 bits wide. Beside its products a warp issues a number that
// does not depend on the tile, and some for each of its copies of 16 bytes.
struct StepSlots { double own, per_copy; };
inline constexpr StepSlots kPanelStep{38, 2};
inline constexpr double kSecondPairSlots = 14;  // of a step of two pairs: the places of their panels
inline constexpr StepSlots kListedStep{60, 3};  // convolutions: copies of x; those of the filters as of any matrix
inline constexpr StepSlots kAnalyticStep{272, 44};  // with each place computed anew
inline constexpr double kAnalyticFilterSlots = 6;
inline constexpr double kNumberSlots = 24;  // of a convolution that reads number by number, for each of them

// Of a warp whose sums are 16 fragments_m by 8 fragments_n: HMMA and LDSM.
constexpr double product_slots(int fragments_m, int fragments_n) {
  constexpr int kProducts = LinearTile::kPanel / 16;
  return kProducts * (fragments_m * fragments_n + fragments_m + fragments_n / 2.0);
}

// Its sums of h, rounded into panels: two roundings and two stores for each fragment.
inline constexpr double kRoundSlots = 4;

// For 8 neighbouring numbers of y: rounded and stored; and what may come to them.
inline constexpr double kStoreSlots = 14, kBiasSlots = 12, kResidualSlots = 24, kProductSlots = 8;
// Of pivoted factors: places, h for pivots, and biases by place. As if every column had a pivot among its lanes.
inline constexpr double kPivotSlots = 132;
constexpr double activation_slots(Activation activation) {
  switch (activation) {
    case Activation::none: return 0;
    case Activation::relu: return 1.5;
    case Activation::gelu: return 72;
    case Activation::gelu_tanh: return 56;
    case Activation::silu: return 40;
  }
  return 0;
}

// Backwards: the gradient is asked for and widened as a residual is; its product with the derivative, and sums over rows.
inline constexpr double kRowSumSlots = 27;
constexpr double derivative_slots(Activation activation) {
  switch (activation) {
    case Activation::none: return 0;
    case Activation::relu: return 11;
    case Activation::gelu: return 100;
    case Activation::gelu_tanh: return 93;
    case Activation::silu: return 53;
  }
  return 0;
}

// A few rows (shrink_expand.cuh): a chunk of weights, of 16 rows and 32 columns, and its products with each 8 rows of x,
// or of h in shared memory; then for each 8 rows the sums of the warps, the staging of h by 16 bytes, and the end of a
// warp's numbers.
inline constexpr double kWeightSlots = 11, kTokenSlots = 19, kStagedTokenSlots = 12;
inline constexpr double kWarpSumSlots = 60, kStagingSlots = 30, kTokenEndSlots = 60;  // not held to the SASS

// A depthwise first stage, for each tap: of each pixel of a thread 8 channels.
inline constexpr StepSlots kDepthwiseStep{12, 21};

}  // namespace shrank
