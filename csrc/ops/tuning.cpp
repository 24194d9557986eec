// What was measured, and what is asked: ops without tensors, through which Python keeps csrc/select/measured.h.
#include <torch/csrc/stable/library.h>

#include <string>
#include <string_view>
#include <vector>

#include "../select/json.h"
#include "../select/measured.h"

namespace shrank {
namespace {

void remember(std::string_view key, std::string_view kernel, const std::vector<int64_t>& grid, double microseconds,
              double library_us, std::string_view source) {
  measured::remember(std::string(key), {std::string(kernel), grid, microseconds, library_us, std::string(source)});
}

void forget() { measured::forget_all(); }

void note_problems(bool on) { measured::note_problems(on); }

// {"key": problem, ...}
std::string noted() {
  Object problems;
  for (const auto& [key, problem] : measured::noted()) problems.add(key.c_str(), problem);
  return problems.text();
}

}  // namespace
}  // namespace shrank

STABLE_TORCH_LIBRARY_FRAGMENT(shrank, library) {
  library.def(
      "remember_measured(str key, str kernel, int[] grid, float microseconds, float library_us, str source) -> ()");
  library.def("forget_measured() -> ()");
  library.def("note_problems(bool on) -> ()");
  library.def("noted_problems() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(shrank, CompositeExplicitAutograd, library) {
  library.impl("remember_measured", TORCH_BOX(&shrank::remember));
  library.impl("forget_measured", TORCH_BOX(&shrank::forget));
  library.impl("note_problems", TORCH_BOX(&shrank::note_problems));
  library.impl("noted_problems", TORCH_BOX(&shrank::noted));
}
