// What the instructions answered, as it is written to a file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace shrank::conformance {

// What an output holds before its kernel runs: a word that was not written shows.
inline constexpr uint32_t kUntouched = 0x5eedbeefu;

struct Result {
  std::string name;
  std::vector<uint32_t> input, output;
};

struct Machine { std::string device, arch, driver, cuda; };

// JSON: the machine, and for each name its output, as rows of 8 words in hexadecimal.
void write(const std::string& path, const Machine& machine, const std::vector<Result>& results);

}  // namespace shrank::conformance
