// Kernels that know their end when they are compiled: what bias, an activation and a residual cost is the difference
// of two straight pieces of code. For reading (tests/csrc/sass_loops.py), never for running.
#include "../../csrc/kernels/expand_backward.cuh"
#include "../../csrc/kernels/launch.cuh"
#include "../../csrc/kernels/low_rank_linear.cuh"

namespace shrank {

enum End { kBias = 1, kResidual = 2 };

template <int BLOCK_M, Activation KIND, int ENDS> struct WithEnd {
  using Kernel = LowRankLinear<arch::bfloat16, BLOCK_M, 128, 1>;
  using Params = LowRankLinearParams;
  static constexpr int kThreads = Kernel::kThreads, kSharedBytes = Kernel::kSharedBytes;

  SHRANK_DEVICE static void run(const Params& given) {
    Params params = given;
    params.activation = KIND;
    params.pair[0].h = nullptr;
    decide<(ENDS & kBias) != 0>(params.pair[0].bias);
    decide<(ENDS & kResidual) != 0>(params.residual);
    __builtin_assume(params.x != nullptr);
    Kernel::run(params);
  }

  template <bool THERE, typename Pointer> SHRANK_DEVICE static void decide(Pointer& pointer) {
    if constexpr (THERE) __builtin_assume(pointer != nullptr);
    else pointer = nullptr;
  }
};

using Kernel = void (*)(LowRankLinearParams);
template <int BLOCK_M>
const Kernel kEnds[] = {
    entry<WithEnd<BLOCK_M, Activation::none, 0>>,         entry<WithEnd<BLOCK_M, Activation::none, kBias>>,
    entry<WithEnd<BLOCK_M, Activation::none, kResidual>>, entry<WithEnd<BLOCK_M, Activation::relu, 0>>,
    entry<WithEnd<BLOCK_M, Activation::gelu, 0>>,         entry<WithEnd<BLOCK_M, Activation::gelu_tanh, 0>>,
    entry<WithEnd<BLOCK_M, Activation::silu, 0>>,
};
const Kernel* const kAll[] = {kEnds<64>, kEnds<128>};

// The way back through the end of a layer without bias.
template <Activation KIND, bool SUMS> struct WithGradient {
  using Kernel = ExpandBackward<arch::bfloat16, 64, 128, 1>;
  using Params = ExpandBackwardParams;
  static constexpr int kThreads = Kernel::kThreads, kSharedBytes = Kernel::kSharedBytes;

  SHRANK_DEVICE static void run(const Params& given) {
    Params params = given;
    params.activation = KIND;
    params.pair[0].bias = nullptr;
    if constexpr (SUMS) __builtin_assume(params.sums[0] != nullptr);
    else params.sums[0] = nullptr;
    Kernel::run(params);
  }
};

using BackwardKernel = void (*)(ExpandBackwardParams);
const BackwardKernel kGradients[] = {
    entry<WithGradient<Activation::relu, false>>, entry<WithGradient<Activation::relu, true>>,
    entry<WithGradient<Activation::gelu, false>>, entry<WithGradient<Activation::gelu_tanh, false>>,
    entry<WithGradient<Activation::silu, false>>,
};

}  // namespace shrank
