// Conversions, approximations and packed access to global memory: arch/scalar.cuh.
#pragma once

#include "../arch/warp.cuh"
#include "case.cuh"

namespace shrank::conformance {

inline constexpr int kThreads = 64, kNumbers = 512;

template <typename T> struct Widen : Case<Inputs::halves, kThreads, kNumbers / 2, kNumbers> {
  SHRANK_DEVICE static void run(const Params& params) {
    for (int i = arch::thread_index(); i < kNumbers; i += kThreads)
      output<float>(params)[i] = arch::widen(input<T>(params)[i]);
  }
};

template <typename T> struct RoundTo : Case<Inputs::floats, kThreads, kNumbers, kNumbers / 2> {
  SHRANK_DEVICE static void run(const Params& params) {
    for (int i = arch::thread_index(); i < kNumbers; i += kThreads)
      output<T>(params)[i] = arch::round_to<T>(input<float>(params)[i]);
  }
};

template <typename T> struct RoundToPair : Case<Inputs::floats, kThreads, kNumbers, kNumbers / 2> {
  SHRANK_DEVICE static void run(const Params& params) {
    const float* numbers = input<float>(params);
    for (int i = arch::thread_index(); i < kNumbers / 2; i += kThreads)
      words_out(params)[i] = arch::round_to_pair<T>(numbers[i * 2], numbers[i * 2 + 1]);
  }
};

template <typename T> struct WidenPair : Case<Inputs::halves, kThreads, kNumbers / 2, kNumbers> {
  SHRANK_DEVICE static void run(const Params& params) {
    for (int i = arch::thread_index(); i < kNumbers / 2; i += kThreads)
      arch::store(output<float>(params) + i * 2, arch::widen_pair<T>(words_in(params)[i]));
  }
};

struct Exp2Approximate : Case<Inputs::exponents, kThreads, kNumbers, kNumbers> {
  SHRANK_DEVICE static void run(const Params& params) {
    for (int i = arch::thread_index(); i < kNumbers; i += kThreads)
      output<float>(params)[i] = arch::exp2_approximate(input<float>(params)[i]);
  }
};

struct ReciprocalApproximate : Case<Inputs::divisors, kThreads, kNumbers, kNumbers> {
  SHRANK_DEVICE static void run(const Params& params) {
    for (int i = arch::thread_index(); i < kNumbers; i += kThreads)
      output<float>(params)[i] = arch::reciprocal_approximate(input<float>(params)[i]);
  }
};

// Of neighbours, in both orders.
struct MaxOrNan : Case<Inputs::floats, kThreads, kNumbers, kNumbers> {
  SHRANK_DEVICE static void run(const Params& params) {
    const float* numbers = input<float>(params);
    for (int i = arch::thread_index(); i < kNumbers; i += kThreads)
      output<float>(params)[i] = arch::max_or_nan(numbers[i], numbers[i ^ 1]);
  }
};

// Of neighbours: both halves of the product; the first is unknown to the compiler, and the same number.
struct MultiplyWide : Case<Inputs::bits, kThreads, kNumbers, kNumbers> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int* numbers = input<int>(params);
    for (int i = arch::thread_index() * 2; i < kNumbers; i += kThreads * 2) {
      const int64_t product = arch::multiply_wide(arch::anew(numbers[i]), numbers[i + 1]);
      words_out(params)[i] = static_cast<uint32_t>(product);
      words_out(params)[i + 1] = static_cast<uint32_t>(product >> 32);
    }
  }
};

// Of neighbours: both halves of their product and the first, as a number without sign.
struct MultiplyAddWide : Case<Inputs::bits, kThreads, kNumbers, kNumbers> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int* numbers = input<int>(params);
    for (int i = arch::thread_index() * 2; i < kNumbers; i += kThreads * 2) {
      const auto* from = reinterpret_cast<const char*>(uintptr_t{words_in(params)[i]});
      const auto sum = reinterpret_cast<uintptr_t>(arch::multiply_add_wide(numbers[i], numbers[i + 1], from));
      words_out(params)[i] = static_cast<uint32_t>(sum);
      words_out(params)[i + 1] = static_cast<uint32_t>(sum >> 32);
    }
  }
};

// Every other word; the rest cannot be read.
struct LoadWordIf : Case<Inputs::bits, kThreads, kNumbers, kNumbers> {
  SHRANK_DEVICE static void run(const Params& params) {
    for (int i = arch::thread_index(); i < kNumbers; i += kThreads)
      words_out(params)[i] = arch::load_word_if(i % 2 == 0, i % 2 == 0 ? words_in(params) + i : nullptr);
  }
};

// The same of 16 bytes.
template <bool ONCE> struct LoadWordsIf : Case<Inputs::bits, kThreads, kThreads * 4, kThreads * 4> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int thread = arch::thread_index();
    const bool go = thread % 2 == 0;
    const uint32_t* const from = go ? words_in(params) + thread * 4 : nullptr;
    arch::store(words_out(params) + thread * 4, ONCE ? arch::load_once_if(go, from) : arch::load_words_if(go, from));
  }
};

// What the lane has whose number differs in the bits of LANES.
template <int LANES> struct Exchange : Case<Inputs::floats, kWarp, kWarp, kWarp> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int lane = arch::lane_index();
    output<float>(params)[lane] = arch::exchange<LANES>(input<float>(params)[lane]);
  }
};

// Thread t moves pack t to place kWarp - 1 - t.
template <typename T, int COUNT>
struct LoadStore : Case<Inputs::bits, kWarp, kWarp * sizeof(T) * COUNT / 4, kWarp * sizeof(T) * COUNT / 4> {
  SHRANK_DEVICE static void run(const Params& params) {
    const int thread = arch::thread_index();
    arch::prefetch_if(true, params.input);  // reads nothing: what can be seen is that it does no harm
    arch::prefetch_if(false, nullptr);
    const arch::Pack<T, COUNT> pack = arch::load<T, COUNT>(input<T>(params) + thread * COUNT);
    arch::store(output<T>(params) + (kWarp - 1 - thread) * COUNT, pack);
  }
};

}  // namespace shrank::conformance
