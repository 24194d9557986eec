// shrank::explain: what select decides for a problem on a GPU that need not be here, as JSON.
#include "../select/explain.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <string_view>

namespace {

std::string explain(int64_t M, int64_t K, int64_t N, int64_t R, std::string_view dtype, std::string_view activation,
                    bool bias, bool residual, bool training, std::string_view gpu) {
  return shrank::explain({M, K, N, R, shrank::parse_dtype(dtype), shrank::parse_activation(activation), bias, residual,
                          training},
                         shrank::device_named(gpu));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(shrank, library) {
  library.def("explain(int M, int K, int N, int R, str dtype, str activation, bool bias, bool residual, bool training, "
              "str gpu) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(shrank, CompositeExplicitAutograd, library) {
  library.impl("explain", TORCH_BOX(&explain));
}
