#include "low_rank_linear_multi.h"

#include <algorithm>

#include "../select/linear_select.h"
#include "../select/shrink_expand_grid.h"
#include "few_rows.h"
#include "low_rank_linear.h"

namespace shrank {
namespace {

constexpr const char* kOp = "shrank::low_rank_linear_multi";
constexpr std::size_t kMost = ShrinkExpandTile::kMostLayers;
const std::optional<Tensor> kNone;

LowRankLinear layer(const LowRankLinearMulti& args, std::size_t i) {
  return {args.x, args.down[i], args.up[i], args.bias[i], "none", kNone};
}

// The law of ops/multi.py beside that of each layer.
void check_counts(const LowRankLinearMulti& args) {
  const std::size_t count = args.down.size();
  STD_TORCH_CHECK(count > 0 && args.up.size() == count && args.bias.size() == count, kOp, ": down, up and bias are ",
                  count, ", ", args.up.size(), " and ", args.bias.size(), ", wanted one of each for each layer");
}

// Of layers that take the kernels for a few rows: where each is among all, and on which grid.
struct Member {
  std::size_t at;
  LinearProblem problem;
  LinearGrid grid;
};

void run_together(const LowRankLinearMulti& args, const std::vector<Member>& members, std::vector<Tensor>& y,
                  const Runtime& runtime) {
  FewRows few(args.x, members.front().problem);
  int tokens = 0;
  for (const Member& each : members) {
    y[each.at] = few.add_layer(each.problem.N);
    few.add_pair(args.down[each.at], args.up[each.at], args.bias[each.at], each.grid.blocks_n, false);
    tokens = std::max(tokens, each.grid.tile.block_m);
  }
  few.run({tokens, Form::plain, ShrinkExpandTile::kMostLayers}, runtime);
}

}  // namespace

std::vector<Tensor> low_rank_linear_multi(const LowRankLinearMulti& args, const Runtime& runtime) {
  check_counts(args);
  std::vector<Tensor> y(args.down.size(), args.x);
  std::vector<Member> members;
  const auto run_members = [&] {
    if (members.size() == 1) y[members[0].at] = low_rank_linear(layer(args, members[0].at), runtime);
    else if (!members.empty()) run_together(args, members, y, runtime);
    members.clear();
  };
  for (std::size_t i = 0; i < args.down.size(); i++) {
    const LinearProblem problem = problem_of(layer(args, i), false, runtime);
    const LinearChoice& choice = recall(problem, runtime.device(args.x.get_device_index()));
    if (choice.kernel != LinearKernel::shrink_expand) {
      y[i] = low_rank_linear(layer(args, i), runtime);
      continue;
    }
    members.push_back({i, problem, choice.grid});
    if (members.size() == kMost) run_members();
  }
  run_members();
  return y;
}

std::vector<Tensor> low_rank_linear_multi_as(const LowRankLinearMulti& args, int64_t tokens,
                                             const std::vector<int64_t>& splits, const Runtime& runtime) {
  check_counts(args);
  STD_TORCH_CHECK(args.down.size() <= kMost && splits.size() == args.down.size(), kOp, ": ", args.down.size(),
                  " layers and ", splits.size(), " splits, wanted as many of each, at most ", kMost);
  const Device& device = runtime.device(args.x.get_device_index());
  std::vector<Tensor> y(args.down.size(), args.x);
  std::vector<Member> members;
  for (std::size_t i = 0; i < args.down.size(); i++) {
    const LinearProblem problem = problem_of(layer(args, i), false, runtime);
    const LinearChoice choice = chosen_for(
        kOp, [&] { return choice_named(problem, device, "shrink_expand", {tokens, 0, splits[i]}); });
    members.push_back({i, problem, choice.grid});
  }
  run_together(args, members, y, runtime);
  return y;
}

}  // namespace shrank
