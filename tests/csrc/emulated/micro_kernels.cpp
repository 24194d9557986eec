#include "micro_kernels.h"

#include <functional>
#include <map>
#include <stdexcept>

#include "micro_banks.cuh"

namespace shrank::micro {
namespace {

using emulator::Result, emulator::Options;
using Run = std::function<Result(const MicroParams&, const Options&)>;

template <typename Kernel> Run runner(const std::string& name) {
  return [name](const MicroParams& params, const Options& options) {
    constexpr std::size_t bytes = kNumbers * sizeof(uint32_t);
    const emulator::Index3 grid{static_cast<unsigned>(Kernel::kBlocks), 1, 1};
    const std::vector<emulator::Buffer> buffers{{"input", params.input, bytes}, {"output", params.output, bytes, true}};
    return emulator::launch<Kernel>(name, grid, params, buffers, options);
  };
}

#define SHRANK_KERNEL(name) {#name, runner<name>(#name)}
std::map<std::string, Run> kernels() {
  return {
      SHRANK_KERNEL(through_shared),
      SHRANK_KERNEL(no_barrier),
      SHRANK_KERNEL(warp_barrier_for_a_block),
      SHRANK_KERNEL(within_a_warp),
      SHRANK_KERNEL(no_warp_barrier),
      SHRANK_KERNEL(written_again_too_soon),
      SHRANK_KERNEL(two_writers),
      SHRANK_KERNEL(two_barriers),
      SHRANK_KERNEL(skipped_barrier),
      SHRANK_KERNEL(skipped_by_lanes),
      SHRANK_KERNEL(divergent_lanes),
      SHRANK_KERNEL(by_copies),
      SHRANK_KERNEL(read_before_the_wait),
      SHRANK_KERNEL(waits_for_another_group),
      SHRANK_KERNEL(copy_seen_without_a_barrier),
      SHRANK_KERNEL(copied_over_too_soon),
      SHRANK_KERNEL(never_awaited),
      SHRANK_KERNEL(never_committed),
      SHRANK_KERNEL(written_while_copied),
      SHRANK_KERNEL(copy_of_nothing_is_zero),
      SHRANK_KERNEL(uninitialised),
      SHRANK_KERNEL(past_shared),
      SHRANK_KERNEL(before_shared),
      SHRANK_KERNEL(misaligned_shared),
      SHRANK_KERNEL(past_the_input),
      SHRANK_KERNEL(one_past_the_output),
      SHRANK_KERNEL(copy_past_the_input),
      SHRANK_KERNEL(misaligned_global),
      SHRANK_KERNEL(writes_the_input),
      SHRANK_KERNEL(reads_the_output),
      SHRANK_KERNEL(one_place_two_threads),
      SHRANK_KERNEL(register_array_overrun),
      SHRANK_KERNEL(register_array_overrun_far),
      SHRANK_KERNEL(divides_by_zero),
      SHRANK_KERNEL(writes_the_host),
      SHRANK_KERNEL(read_by_two_lanes),
      SHRANK_KERNEL(one_lane_past_shared),
      SHRANK_KERNEL(copies_an_odd_struct),
      SHRANK_KERNEL(half_a_warp),
      SHRANK_KERNEL(two_blocks_one_place),
      SHRANK_KERNEL(before_the_grid_before),
      SHRANK_KERNEL(never_waits_for_the_grid_before),
      SHRANK_KERNEL(too_much_shared),
      SHRANK_KERNEL(too_many_threads),
      SHRANK_KERNEL(matrix_rows_in_one_bank_group),
      SHRANK_KERNEL(matrix_rows_side_by_side),
      SHRANK_KERNEL(pairs_side_by_side),
      SHRANK_KERNEL(pairs_with_gaps),
      SHRANK_KERNEL(copies_into_one_bank_group),
  };
}
#undef SHRANK_KERNEL

}  // namespace

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const auto& [name, run] : kernels()) all.push_back(name);
  return all;
}

Result run(const std::string& name, const uint32_t* input, uint32_t* output, const Options& options) {
  const auto all = kernels();
  const auto found = all.find(name);
  if (found == all.end()) throw std::invalid_argument("no kernel is called " + name);
  return found->second({input, output}, options);
}

}  // namespace shrank::micro
