#include "low_rank_linear_multi.h"

#include <algorithm>

#include "../select/linear_select.h"
#include "../select/shrink_expand_grid.h"
#include "few_rows.h"
#include "low_rank_linear.h"
#include "low_rank_pivoted.h"

namespace shrank {
namespace {

constexpr const char* kOp = "shrank::low_rank_linear_multi";
constexpr std::size_t kMost = ShrinkExpandTile::kMostLayers;
const std::optional<Tensor> kNone;

LowRankLinear plain(const LowRankLinearMulti& args, std::size_t i) {
  return {args.x, args.down[i], args.up[i], args.bias[i], "none", kNone};
}

LowRankPivoted pivoted(const LowRankLinearMulti& args, std::size_t i) {
  return {args.x, args.down[i], args.up[i], args.bias[i], args.pivot_bias[i], *args.order[i], "none", kNone};
}

LinearProblem problem_of_layer(const LowRankLinearMulti& args, std::size_t i, const Runtime& runtime) {
  return args.order[i] ? problem_of(pivoted(args, i), false, runtime) : problem_of(plain(args, i), false, runtime);
}

Tensor run_alone(const LowRankLinearMulti& args, std::size_t i, const Runtime& runtime) {
  return args.order[i] ? low_rank_pivoted(pivoted(args, i), runtime) : low_rank_linear(plain(args, i), runtime);
}

// The law of ops/multi.py beside that of each layer.
void check(const LowRankLinearMulti& args) {
  const std::size_t count = args.down.size();
  const bool fits = count > 0 && args.up.size() == count && args.bias.size() == count &&
                    args.pivot_bias.size() == count && args.order.size() == count;
  STD_TORCH_CHECK(fits, kOp, ": down, up, bias, pivot_bias and order are ", count, ", ", args.up.size(), ", ",
                  args.bias.size(), ", ", args.pivot_bias.size(), " and ", args.order.size(),
                  ", wanted one of each for each layer");
  for (std::size_t i = 0; i < count; i++)
    STD_TORCH_CHECK(args.order[i] || !args.pivot_bias[i], kOp, ": pivot_bias[", i, "] is ", shape(*args.pivot_bias[i]),
                    ", wanted none without an order");
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
  ShrinkExpandTile tile{0, Form::plain, ShrinkExpandTile::kMostLayers};
  for (const Member& each : members) {
    y[each.at] = few.add_layer(each.problem.N);
    few.add_pair(args.down[each.at], args.up[each.at], args.bias[each.at], each.grid.blocks_n, false);
    tile.tokens = std::max(tile.tokens, each.grid.tile.block_m);
    if (!each.problem.pivoted) continue;
    few.add_pivots(args.pivot_bias[each.at], *args.order[each.at]);
    tile.form = Form::pivoted;
  }
  few.run(tile, runtime);
}

}  // namespace

std::vector<Tensor> low_rank_linear_multi(const LowRankLinearMulti& args, const Runtime& runtime) {
  check(args);
  std::vector<Tensor> y(args.down.size(), args.x);
  std::vector<Member> members;
  const auto run_members = [&] {
    if (members.size() == 1) y[members[0].at] = run_alone(args, members[0].at, runtime);
    else if (!members.empty()) run_together(args, members, y, runtime);
    members.clear();
  };
  for (std::size_t i = 0; i < args.down.size(); i++) {
    const LinearProblem problem = problem_of_layer(args, i, runtime);
    const LinearChoice& choice = recall(problem, runtime.device(args.x.get_device_index()));
    if (choice.kernel != LinearKernel::shrink_expand) {
      y[i] = run_alone(args, i, runtime);
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
  check(args);
  STD_TORCH_CHECK(args.down.size() <= kMost && splits.size() == args.down.size(), kOp, ": ", args.down.size(),
                  " layers and ", splits.size(), " splits, wanted as many of each, at most ", kMost);
  const Device& device = runtime.device(args.x.get_device_index());
  std::vector<Tensor> y(args.down.size(), args.x);
  std::vector<Member> members;
  for (std::size_t i = 0; i < args.down.size(); i++) {
    const LinearProblem problem = problem_of_layer(args, i, runtime);
    const LinearChoice choice = chosen_for(
        kOp, [&] { return choice_named(problem, device, "shrink_expand", {tokens, 0, splits[i]}); });
    members.push_back({i, problem, choice.grid});
  }
  run_together(args, members, y, runtime);
  return y;
}

}  // namespace shrank
