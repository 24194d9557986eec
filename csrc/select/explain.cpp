#include "explain.h"

#include <algorithm>

#include "conv_cost.h"
#include "conv_select.h"
#include "json.h"
#include "linear_cost.h"
#include "linear_select.h"
#include "problem_json.h"
#include "shrink_expand_grid.h"

namespace shrank {
namespace {

using shrank::json;

std::string json(const Device& d) {
  return Object()
      .add("name", json(d.name))
      .add("arch", json(d.arch))
      .add("sms", json(d.sms))
      .add("bandwidth", json(d.bandwidth))
      .add("flops_half", json(d.flops_half))
      .add("flops_float32", json(d.flops_float32))
      .add("flops_float64", json(d.flops_float64))
      .add("l2_bytes", json(d.l2_bytes))
      .add("smem_per_block", json(d.smem_per_block))
      .add("launch_us", json(d.launch_us))
      .add("node_us", json(d.node_us))
      .add("source", json(d.source))
      .text();
}

// null for a kernel that has none.
std::string json(const LinearGrid& g) {
  if (g.blocks_n == 0) return "null";
  return Object()
      .add("block_m", json(g.tile.block_m))
      .add("max_rank", json(g.tile.max_rank))
      .add("blocks_m", json(g.blocks_m))
      .add("blocks_n", json(g.blocks_n))
      .text();
}

std::string json(const ConvGrid& g) {
  if (g.blocks_n == 0) return "null";
  return Object()
      .add("gather", json(name_of(g.tile.gather)))
      .add("block_m", json(g.tile.tile.block_m))
      .add("max_rank", json(g.tile.tile.max_rank))
      .add("blocks_m", json(g.blocks_m))
      .add("blocks_n", json(g.blocks_n))
      .text();
}

std::string grid_of(const LinearChoice& c) { return json(c.grid); }
std::string grid_of(const ConvChoice& c) {
  return c.kernel == ConvKernel::conv_expand ? json(c.expand_grid) : json(c.grid);
}

template <typename Choice> std::string json_choice(const Choice& c) {
  return Object()
      .add("kernel", json(name_of(c.kernel)))
      .add("microseconds", json(c.microseconds))
      .add("reason", json(c.reason))
      .add("grid", grid_of(c))
      .text();
}

template <typename P> std::string list_any(const P& p, const Device& d, std::size_t most) {
  std::string listed;
  for (const auto& each : choices(p, d, most)) listed.append(listed.empty() ? "" : ", ").append(json_choice(each));
  return "[" + listed + "]";
}

template <typename Kernel> std::string json(const Candidate<Kernel>& c) {
  Object shown;
  shown.add("kernel", json(name_of(c.kernel))).add("legal", json(c.why_not == nullptr));
  if (c.why_not) shown.add("why_not", json(c.why_not));
  else shown.add("microseconds", json(c.microseconds));
  return shown.text();
}

// Of a decision to stream weights past a few rows: what is on its way, and what the memory needs there; else null.
std::string in_flight(const LinearProblem& p, const Device& d, const LinearChoice& choice) {
  if (choice.kernel != LinearKernel::shrink_expand) return "null";
  return Object()
      .add("bytes_of_sm", json(bytes_in_flight(p, d, choice.grid)))
      .add("needed", json(bytes_needed_in_flight(p, d)))
      .text();
}
std::string in_flight(const ConvProblem&, const Device&, const ConvChoice&) { return "null"; }

// Whence the decision.
template <typename P, typename Choice> std::string status_of(const P& p, const Device& d, const Choice& choice) {
  const auto evidence = measured::find(measured::key_of(p, d));
  if (!evidence || std::string_view(choice.reason) != kMeasured) return "predicted by the model; not measured";
  return "measured: PyTorch's own calls take " + json(evidence->library_us) + " us; " + evidence->source;
}

template <typename P> std::string explain_any(const P& p, const Device& d) {
  const auto choice = select(p, d);
  auto all = candidates(p, d);  // the decision, then the others that may run, the cheapest first
  std::stable_sort(all.begin(), all.end(), [&](const auto& a, const auto& b) {
    if (a.kernel == choice.kernel) return b.kernel != choice.kernel;
    if (b.kernel == choice.kernel) return false;
    return !a.why_not && (b.why_not || a.microseconds < b.microseconds);
  });
  std::string listed;
  for (const auto& each : all) listed.append(listed.empty() ? "" : ", ").append(json(each));
  return Object()
      .add("problem", problem_json(p))
      .add("device", json(d))
      .add("decision", json_choice(choice))
      .add("runner_up", all[1].why_not ? "null" : json(all[1]))
      .add("candidates", "[" + listed + "]")
      .add("in_flight", in_flight(p, d, choice))
      .add("floor_us", json(floor_us(p, d)))
      .add("dense_us", json(dense_us(p, d)))
      .add("status", json(status_of(p, d, choice)))
      .text();
}

}  // namespace

std::string explain(const LinearProblem& p, const Device& d) { return explain_any(p, d); }
std::string explain(const ConvProblem& p, const Device& d) { return explain_any(p, d); }

std::string list_choices(const LinearProblem& p, const Device& d, std::size_t most) { return list_any(p, d, most); }
std::string list_choices(const ConvProblem& p, const Device& d, std::size_t most) { return list_any(p, d, most); }

}  // namespace shrank
