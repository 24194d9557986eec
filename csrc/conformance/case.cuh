// What a kernel of the conformance program is: a fixed number of words in, a fixed number out.
#pragma once

#include "../arch/position.cuh"
#include "../arch/scalar.cuh"
#include "inputs.h"

namespace shrank::conformance {

struct Params {
  const void* input;
  void* output;
};

template <Inputs KIND, int THREADS, int INPUT_WORDS, int OUTPUT_WORDS, int SHARED_BYTES = 0> struct Case {
  using Params = conformance::Params;
  static constexpr Inputs kInputs = KIND;
  static constexpr int kThreads = THREADS, kSharedBytes = SHARED_BYTES;
  static constexpr int kInputWords = INPUT_WORDS, kOutputWords = OUTPUT_WORDS;
  static constexpr int kBlocksX = 1, kBlocksY = 1;
};

template <typename T> SHRANK_DEVICE const T* input(const Params& params) { return static_cast<const T*>(params.input); }
template <typename T> SHRANK_DEVICE T* output(const Params& params) { return static_cast<T*>(params.output); }
SHRANK_DEVICE const uint32_t* words_in(const Params& params) { return input<uint32_t>(params); }
SHRANK_DEVICE uint32_t* words_out(const Params& params) { return output<uint32_t>(params); }

// A warp's worth of threads.
inline constexpr int kWarp = arch::kWarpSize;

// Which numbers to multiply for a type.
template <typename T> inline constexpr Inputs kFactors = Inputs::bfloat16;
template <> inline constexpr Inputs kFactors<arch::float16> = Inputs::float16;

}  // namespace shrank::conformance
