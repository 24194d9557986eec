// The functions that torch's dispatcher calls: an op's arguments one by one, which its own functions take as one struct.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime.h"
#include "tensors.h"

namespace shrank {

// What an op gets of a tensor, and of one that may be missing.
using TensorIn = const Tensor&;
using MaybeTensor = const std::optional<Tensor>&;

// Of an op whose arguments are an `Args`, made of `Each`. `compute` is the function that gets them, `runtime` a constexpr
// Runtime; both are parts of the type, so that the result is a plain function.
template <typename Args, typename... Each> struct Boxed {
  template <auto compute, const Runtime* runtime> static auto run(Each... each) {
    return compute(Args{each...}, *runtime);
  }

  // What is named instead of chosen (NAME_as).
  template <auto compute, const Runtime* runtime>
  static auto run_named(Each... each, bool training, std::string_view kernel, const std::vector<int64_t>& grid) {
    return compute(Args{each...}, Named{training, kernel, grid}, *runtime);
  }

  // As JSON, what may be named (NAME_choices).
  template <auto compute, const Runtime* runtime> static std::string choices(Each... each, int64_t most) {
    return compute(Args{each...}, most, *runtime);
  }
};

// Registers NAME, NAME_train, NAME_as and NAME_choices for one dispatch key; BOXED is a Boxed.
#define SHRANK_IMPL(library, name, boxed, runtime)                                                                     \
  library.impl(#name, TORCH_BOX((&::shrank::boxed::run<&::shrank::name, &runtime>)));                                  \
  library.impl(#name "_train", TORCH_BOX((&::shrank::boxed::run<&::shrank::name##_train, &runtime>)));                 \
  library.impl(#name "_as", TORCH_BOX((&::shrank::boxed::run_named<&::shrank::name##_as, &runtime>)));                 \
  library.impl(#name "_choices", TORCH_BOX((&::shrank::boxed::choices<&::shrank::name##_choices, &runtime>)))

}  // namespace shrank
