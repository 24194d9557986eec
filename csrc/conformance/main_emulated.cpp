// conformance_emulated OUT.json: what a GPU is asked, asked of the emulator.
#include <cstdio>
#include <stdexcept>

#include "conformance_emulated.h"

int main(int count, char** arguments) try {
  if (count != 2) throw std::runtime_error("usage: conformance_emulated OUT.json");
  const auto results = shrank::conformance::run_emulated();
  shrank::conformance::write(arguments[1], {"emulator", "none", "none", "none"}, results);
  std::printf("%zu instructions on the emulator\n", results.size());
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
