#include "problem_json.h"

#include "json.h"

namespace shrank {
namespace {

// What a linear layer and a convolution have in common.
template <typename P> Object& add_end(Object& object, const P& p) {
  return object.add("dtype", json(name_of(p.dtype)))
      .add("activation", json(name_of(p.activation)))
      .add("bias", json(p.bias))
      .add("residual", json(p.residual))
      .add("training", json(p.training))
      .add("captured", json(p.captured));
}

}  // namespace

std::string problem_json(const LinearProblem& p) {
  Object object;
  object.add("M", json(p.M)).add("K", json(p.K)).add("N", json(p.N)).add("R", json(p.R));
  return add_end(object, p)
      .add("aligned", json(p.aligned))
      .add("gate_R", json(p.gate_R))
      .add("pivoted", json(p.pivoted))
      .text();
}

std::string problem_json(const ConvProblem& p) {
  Object object;
  object.add("batch", json(p.batch))
      .add("C", json(p.C))
      .add("N", json(p.N))
      .add("R", json(p.R))
      .add("input", json_list(p.in))
      .add("output", json_list(p.out()))
      .add("kernel", json_list(p.kernel))
      .add("stride", json_list(p.stride))
      .add("begin", json_list(p.begin))
      .add("end", json_list(p.end))
      .add("dilation", json_list(p.dilation))
      .add("groups", json(p.groups))
      .add("up_groups", json(p.up_groups));
  return add_end(object, p).add("channels_last", json(p.channels_last)).text();
}

}  // namespace shrank
