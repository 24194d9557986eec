#include "machine.h"

#include <sstream>

namespace shrank::rehearsal {
namespace {

// Addresses that are streams, and nothing else.
char streams[64][4];

}  // namespace

Machine& machine() {
  static Machine made = [] {
    Machine fresh;
    fresh.gpus = {{&device_named("h200"), &streams[0][1], {nullptr, &streams[0][1]}}};
    return fresh;
  }();
  return made;
}

void reset(const std::vector<std::string>& gpus) {
  Machine& m = machine();
  auto kernels = std::move(m.kernels);  // registered when the library was loaded
  auto opted_in = std::move(m.opted_in);  // the extension asks once in a process
  m = Machine{};
  m.kernels = std::move(kernels);
  m.opted_in = std::move(opted_in);
  for (std::size_t i = 0; i < gpus.size(); ++i)
    m.gpus.push_back({&device_named(gpus[i]), &streams[i][1], {nullptr, &streams[i][1], &streams[i][2]}});
}

}  // namespace shrank::rehearsal

// ---- what a test asks, by ctypes

using shrank::rehearsal::machine;

extern "C" {

// gpus: names of select's table, a comma between: the machine is as new, with these.
__attribute__((visibility("default"))) void rehearsal_reset(const char* gpus) {
  std::vector<std::string> names;
  std::istringstream text(gpus);
  for (std::string name; std::getline(text, name, ',');) names.push_back(name);
  shrank::rehearsal::reset(names);
}

__attribute__((visibility("default"))) void rehearsal_put_tensors_on(int device) { machine().tensors_on = device; }
__attribute__((visibility("default"))) int rehearsal_current_device() { return machine().current; }
__attribute__((visibility("default"))) void rehearsal_capture(bool on) { machine().capturing = on; }
__attribute__((visibility("default"))) void rehearsal_leave_error(int error) { machine().last_error = error; }
__attribute__((visibility("default"))) int rehearsal_last_error() { return machine().last_error; }

// After `before` calls that go well, `calls` calls of a function of the runtime fail with this error.
__attribute__((visibility("default"))) void rehearsal_fail(const char* function, int error, int calls, int before) {
  machine().faults[function] = {error, calls, before};
}

// Another stream of a device becomes its current one.
__attribute__((visibility("default"))) void rehearsal_use_stream(int device, int number) {
  auto& gpu = machine().gpus.at(static_cast<std::size_t>(device));
  auto at = gpu.streams.begin();
  std::advance(at, number);
  gpu.stream = *at;
}

__attribute__((visibility("default"))) int rehearsal_log_length() { return static_cast<int>(machine().log.size()); }
__attribute__((visibility("default"))) const char* rehearsal_log(int i) {
  return machine().log.at(static_cast<std::size_t>(i)).c_str();
}
__attribute__((visibility("default"))) void rehearsal_clear_log() { machine().log.clear(); }

}  // extern "C"
