// What only C++ can see of select: that it allocates nothing, and how long it takes. tests/csrc/test_select.py has the
// rest.
#include "epilogue_tile.h"
#include "linear_select.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <sstream>

namespace {

int failures = 0;
long allocations = 0;

template <typename A, typename B>
void check_equal(const A& found, const B& wanted, const char* text, int line) {
  if (found == wanted) return;
  std::ostringstream message;
  message << __FILE__ << ":" << line << ": " << text << " is " << found << ", wanted " << wanted << "\n";
  std::fputs(message.str().c_str(), stderr);
  ++failures;
}

}  // namespace

#define CHECK_EQUAL(found, wanted) check_equal(found, wanted, #found, __LINE__)

void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main() {
  using namespace shrank;
  const Device& d = device_named("NVIDIA H200");
  CHECK_EQUAL(d.name, "H200");
  CHECK_EQUAL(find_device("h300") == nullptr, true);

  LinearProblem plain{4096, 4096, 4096, 256};
  plain.bias = true;
  LinearProblem fused = plain;
  fused.activation = Activation::gelu;
  CHECK_EQUAL(name_of(shrank::select(plain, d).kernel), "two_gemms");
  CHECK_EQUAL(name_of(shrank::select(fused, d).kernel) == "two_gemms", false);

  const EpilogueTile tile = epilogue_tile(fused, d);  // 512 vectors of 8: two blocks of 256 lanes
  CHECK_EQUAL(tile.vector, 8);
  CHECK_EQUAL(tile.threads_n, 256);
  CHECK_EQUAL(tile.threads_m, 1);
  CHECK_EQUAL(tile.blocks_n, 2);
  CHECK_EQUAL(tile.blocks_m, 132 * 8 / 2);

  for (int i = 0; i < 10'000; ++i) {  // more problems than are remembered
    LinearProblem any = fused;
    any.M = 1 + i % 300;
    any.training = i % 7 == 0;
    const LinearChoice remembered = shrank::recall(any, d), computed = shrank::select(any, d);
    CHECK_EQUAL(name_of(remembered.kernel), name_of(computed.kernel));
    CHECK_EQUAL(remembered.microseconds, computed.microseconds);
    CHECK_EQUAL(remembered.grid.blocks_m, computed.grid.blocks_m);
    CHECK_EQUAL(remembered.grid.blocks_n, computed.grid.blocks_n);
  }

  for (int i = 0; i < 8; ++i) {  // a thread's first call makes its memory, and a problem's first its key
    fused.M = i;
    shrank::recall(fused, d);
  }
  const long before = allocations;
  constexpr int kCalls = 1'000'000;
  double total = 0;
  const auto started = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) {
    fused.M = i % 8;
    total += shrank::recall(fused, d).microseconds + static_cast<double>(epilogue_tile(fused, d).blocks_m);
  }
  const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - started;
  CHECK_EQUAL(allocations, before);
  CHECK_EQUAL(total > 0, true);
  std::printf("recall + epilogue_tile: %.0f ns\n", elapsed.count() / kCalls);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
