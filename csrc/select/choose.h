// Among the ways to run a problem, the one to take. A problem has `training`; P may be any.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "device.h"
#include "linear_tile.h"
#include "measured.h"
#include "problem_json.h"
#include "vocabulary.h"

namespace shrank {

template <typename Kernel, typename P> struct Way {
  Kernel kernel;
  std::string_view name;
  const char* (*why_not)(const P&, const Device&);  // nullptr: it may run
  double (*microseconds)(const P&, const Device&);  // predicted, in a replayed CUDA graph, if it may run
  const char* reason;
  bool ours = true;  // a matrix kernel of ours, which no card need be good at; else PyTorch's own calls
  bool composed = false;  // not ours either: what other ops choose, one after the other
};

template <typename Kernel> struct Candidate {
  Kernel kernel;
  const char* why_not;  // nullptr: it may run
  double microseconds;  // 0 if it may not
};

template <typename Kernel, typename P, std::size_t Count>
std::array<Candidate<Kernel>, Count> candidates_of(const std::array<Way<Kernel, P>, Count>& ways, const P& p,
                                                   const Device& d) {
  std::array<Candidate<Kernel>, Count> all;
  for (std::size_t i = 0; i < Count; ++i) {
    const char* why_not = ways[i].why_not(p, d);
    all[i] = {ways[i].kernel, why_not, why_not ? 0.0 : ways[i].microseconds(p, d)};
  }
  return all;
}

// The way of this name, which must be allowed; else std::invalid_argument.
template <typename Kernel, typename P, std::size_t Count>
const Way<Kernel, P>& way_named(const std::array<Way<Kernel, P>, Count>& ways, std::string_view name, const P& p,
                                const Device& d) {
  std::array<std::string_view, Count> names;
  for (std::size_t i = 0; i < Count; ++i) {
    names[i] = ways[i].name;
    if (names[i] != name) continue;
    if (const char* why_not = ways[i].why_not(p, d)) throw std::invalid_argument(std::string(name) + ": " + why_not);
    return ways[i];
  }
  throw std::invalid_argument(unknown_name("kernel", name, names));
}

// A tile and the shares of columns, as a caller names them: block_m, max_rank and blocks_n.
struct NamedGrid {
  LinearTile tile;
  int64_t shares;

  explicit NamedGrid(const std::vector<int64_t>& numbers, Form form = Form::plain) {
    if (numbers.size() != 3)
      throw std::invalid_argument("grid has " + std::to_string(numbers.size()) +
                                  " numbers, wanted block_m, max_rank and blocks_n, or none: the cheapest");
    tile = {static_cast<int>(numbers[0]), static_cast<int>(numbers[1]), form};
    shares = numbers[2];
  }
};

template <typename Kernel, typename P> struct Chosen {
  const Way<Kernel, P>& way;
  double microseconds;
};

// What the model must predict that a kernel of ours gains before it is taken unmeasured: no prediction is better than
// some 20 %, and PyTorch's own calls are tuned.
inline constexpr double kNeededGain = 1.25;

// By the model, for training and inference together, so that a layer gives the same bits either way: the cheapest of
// PyTorch's own ways, unless the cheapest of ours costs less than that by kNeededGain and is slower in neither. What other
// ops choose has been weighed so already: it is taken where it costs less, and ours then where that costs less still. The
// last way may always run.
template <typename Kernel, typename P, std::size_t Count>
Chosen<Kernel, P> choose(const std::array<Way<Kernel, P>, Count>& ways, const P& p, const Device& d) {
  struct Cost {
    const Way<Kernel, P>* way = nullptr;
    double training = 0, inference = 0;

    double total() const { return training + inference; }
  };
  P training = p, inference = p;
  training.training = true;
  inference.training = false;
  const auto cost_of = [&](const Way<Kernel, P>& way) {
    return Cost{&way, way.microseconds(training, d), way.microseconds(inference, d)};
  };
  const auto cheapest = [&](bool ours, bool composed, const Cost& than) {
    Cost best;
    for (const Way<Kernel, P>& way : ways) {
      if (way.ours != ours || way.composed != composed || way.why_not(p, d)) continue;
      const Cost cost = cost_of(way);
      if (cost.training > than.training || cost.inference > than.inference) continue;
      if (!best.way || cost.total() < best.total()) best = cost;
    }
    return best;
  };
  const Cost library = cheapest(false, false, cost_of(ways.back())), others = cheapest(false, true, library);
  const Cost& otherwise = others.way ? others : library;
  const Cost ours = cheapest(true, false, otherwise);
  const Cost& best = ours.way && ours.total() * kNeededGain <= library.total() ? ours : otherwise;
  return {*best.way, p.training ? best.training : best.inference};
}

inline constexpr const char* kMeasured = "measured to be the fastest here";

// By what was measured, if that may still run; else by the model.
template <typename Choice, typename P, typename Named, typename Modelled>
Choice choose_measured(const P& p, const Device& d, const Named& named, const Modelled& modelled) {
  const std::string key = measured::key_of(p, d);
  if (measured::notes_problems()) measured::note(key, problem_json(p));
  if (const auto evidence = measured::find(key)) {
    try {
      Choice choice = named(evidence->kernel, evidence->grid);
      choice.microseconds = evidence->microseconds;
      choice.reason = kMeasured;
      return choice;
    } catch (const std::invalid_argument&) {  // of another build, whose tiles these are not
    }
  }
  return modelled();
}

// What was chosen for 64 problems at most; those whose numbers collide push each other out. Allocates nothing; a Device
// is known by its address.
template <typename P, typename Choice> class Memory {
 public:
  template <typename Select>
  const Choice& recall(const P& p, uint64_t mix, const Device& d, const Select& select) {
    Entry& entry = entries_[(mix * 0x9E3779B97F4A7C15ull) >> 58];
    const uint64_t now = measured::epoch();
    if (entry.device != &d || entry.epoch != now || !(entry.problem == p)) entry = {p, &d, now, select(p, d)};
    return entry.choice;
  }

 private:
  struct Entry {
    P problem{};
    const Device* device = nullptr;
    uint64_t epoch = 0;
    Choice choice{};
  };
  std::array<Entry, 64> entries_;
};

}  // namespace shrank
