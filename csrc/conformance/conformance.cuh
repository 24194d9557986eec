// Every instruction of arch/, once, on fixed input: what a GPU answers is what the emulator must answer.
#pragma once

#include "matrix.cuh"
#include "scalar.cuh"
#include "shared.cuh"

namespace shrank::conformance {

// visit(name, kernel): the instruction's name, and an object of the kernel's type.
template <typename Visit> void for_each_case(const Visit& visit) {
  visit("widen<bfloat16>", Widen<arch::bfloat16>{});
  visit("widen<float16>", Widen<arch::float16>{});
  visit("round_to<bfloat16>", RoundTo<arch::bfloat16>{});
  visit("round_to<float16>", RoundTo<arch::float16>{});
  visit("round_to_pair<bfloat16>", RoundToPair<arch::bfloat16>{});
  visit("round_to_pair<float16>", RoundToPair<arch::float16>{});
  visit("widen_pair<bfloat16>", WidenPair<arch::bfloat16>{});
  visit("widen_pair<float16>", WidenPair<arch::float16>{});
  visit("exp2_approximate", Exp2Approximate{});
  visit("reciprocal_approximate", ReciprocalApproximate{});
  visit("max_or_nan", MaxOrNan{});
  visit("multiply_wide", MultiplyWide{});
  visit("multiply_add_wide", MultiplyAddWide{});
  visit("load_word_if", LoadWordIf{});
  visit("load_words_if", LoadWordsIf<false>{});
  visit("load_once_if", LoadWordsIf<true>{});
  visit("exchange<4>", Exchange<4>{});
  visit("exchange<8>", Exchange<8>{});
  visit("exchange<16>", Exchange<16>{});
  visit("load_store<uint32_t, 4>", LoadStore<uint32_t, 4>{});
  visit("load_store<bfloat16, 8>", LoadStore<arch::bfloat16, 8>{});
  visit("load_store<float, 2>", LoadStore<float, 2>{});
  visit("load_shared_words", LoadSharedWords{});
  visit("load_shared_floats", LoadSharedFloats{});
  visit("store_shared_words", StoreSharedWords{});
  visit("store_shared_floats", StoreSharedFloats{});
  visit("load_shared_pair", SharedPairs{});
  visit("copy_async", CopyAsync<Copy::plain>{});
  visit("copy_async_reused", CopyAsync<Copy::reused>{});
  visit("copy_async_if", CopyAsync<Copy::conditional>{});
  visit("copy_async_reused_if", CopyAsync<Copy::reused_conditional>{});
  visit("sync_threads", SyncThreads{});
  visit("grid_dependency", GridDependency{});
  visit("position", Positions{});
  visit("load_matrices", LoadMatrices{});
  visit("load_matrices_transposed", LoadMatricesTransposed{});
  visit("multiply_add<bfloat16>", MultiplyAdd<arch::bfloat16>{});
  visit("multiply_add<float16>", MultiplyAdd<arch::float16>{});
}

}  // namespace shrank::conformance
