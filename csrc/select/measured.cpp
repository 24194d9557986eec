#include "measured.h"

#include <mutex>
#include <shared_mutex>

#include "integers.h"

namespace shrank::measured {
namespace {

struct Store {
  std::shared_mutex mutex;
  std::map<std::string, Evidence> evidence;
  std::map<std::string, std::string> problems;
  std::atomic<uint64_t> epoch{0};
  std::atomic<bool> notes{false};
};

Store& store() {
  static Store made;
  return made;
}

int64_t bucket(int64_t tokens) {
  int64_t least = 1;
  while (least < tokens) least *= 2;
  return tokens == 0 ? 0 : least;
}

// Words and numbers, one space between.
class Key {
 public:
  template <typename T> Key& add(const T& part) {
    if (!text_.empty()) text_ += ' ';
    if constexpr (std::is_integral_v<T>) text_ += std::to_string(part);
    else text_.append(part);
    return *this;
  }
  Key& add_if(bool holds, const char* word) { return holds ? add(std::string_view(word)) : *this; }
  Key& add_size(const char* name, int64_t size) { return add(name + std::to_string(size)); }
  Key& add_sizes(const char* name, const Size3& sizes) {
    return add(name + std::to_string(sizes[0]) + "x" + std::to_string(sizes[1]) + "x" + std::to_string(sizes[2]));
  }
  std::string text_;
};

template <typename P> Key& add_end(Key& key, const P& p, const Device& d) {
  return key.add(name_of(p.dtype))
      .add(name_of(p.activation))
      .add_if(p.bias, "bias")
      .add_if(p.residual, "residual")
      .add_if(p.captured, "captured")
      .add(std::string_view("on"))
      .add(d.reported_name);
}

}  // namespace

std::string key_of(const LinearProblem& p, const Device& d) {
  Key key;
  key.add(std::string_view("linear")).add_size("M", bucket(p.M)).add_size("K", p.K).add_size("N", p.N);
  key.add_size("R", p.R);
  if (p.gate_R) key.add_size("gate", p.gate_R);
  key.add_if(p.pivoted, "pivoted");
  key.add_if(!p.aligned, "unaligned");
  return add_end(key, p, d).text_;
}

std::string key_of(const ConvProblem& p, const Device& d) {
  Key key;
  key.add(std::string_view("conv")).add_size("B", bucket(p.batch)).add_size("C", p.C).add_size("N", p.N);
  key.add_size("R", p.R).add_sizes("in", p.in).add_sizes("kernel", p.kernel).add_sizes("stride", p.stride);
  key.add_sizes("begin", p.begin).add_sizes("end", p.end).add_sizes("dilation", p.dilation);
  key.add_size("groups", p.groups).add_size("up_groups", p.up_groups).add_if(p.channels_last, "channels_last");
  return add_end(key, p, d).text_;
}

void remember(const std::string& key, Evidence evidence) {
  const std::unique_lock lock(store().mutex);
  store().evidence[key] = std::move(evidence);
  ++store().epoch;
}

void forget_all() {
  const std::unique_lock lock(store().mutex);
  store().evidence.clear();
  ++store().epoch;
}

std::optional<Evidence> find(const std::string& key) {
  const std::shared_lock lock(store().mutex);
  const auto found = store().evidence.find(key);
  return found == store().evidence.end() ? std::nullopt : std::optional(found->second);
}

uint64_t epoch() { return store().epoch.load(std::memory_order_acquire); }

void note_problems(bool on) {
  const std::unique_lock lock(store().mutex);
  store().problems.clear();
  store().notes = on;
  ++store().epoch;  // what was chosen before is asked again, and noted
}

bool notes_problems() { return store().notes.load(std::memory_order_relaxed); }

void note(const std::string& key, const std::string& problem) {
  const std::unique_lock lock(store().mutex);
  store().problems.emplace(key, problem);
}

std::map<std::string, std::string> noted() {
  const std::shared_lock lock(store().mutex);
  return store().problems;
}

}  // namespace shrank::measured
