// What was measured on a device, which goes before what the model predicts; and what a model asks, so that it can be
// measured.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "conv_problem.h"
#include "device.h"
#include "linear_problem.h"

namespace shrank::measured {

struct Evidence {
  std::string kernel;           // as select calls it
  std::vector<int64_t> grid;    // block_m, max_rank and blocks_n, or nothing
  double microseconds, library_us;  // of it, and of PyTorch's own calls beside it
  std::string source;  // when, on what
};

// Problems of one key share their evidence: tokens and images count by powers of two, and training as inference, so that
// a layer gives the same bits either way.
std::string key_of(const LinearProblem& p, const Device& d);
std::string key_of(const ConvProblem& p, const Device& d);

// In place of what was known under that key.
void remember(const std::string& key, Evidence evidence);
void forget_all();
std::optional<Evidence> find(const std::string& key);

// Another number after each change: what was chosen before may be out of date.
uint64_t epoch();

// While this is on, every problem that is asked for the first time is noted, as JSON (explain.h).
void note_problems(bool on);
bool notes_problems();
void note(const std::string& key, const std::string& problem);
std::map<std::string, std::string> noted();  // by key

}  // namespace shrank::measured
