// The cheapest of many.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

namespace shrank {

// The `most` that cost least, the cheapest first; of equal cost in their order.
template <typename T> std::vector<T> cheapest(std::vector<std::pair<double, T>> all, std::size_t most) {
  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<T> best;
  for (std::size_t i = 0; i < std::min(most, all.size()); ++i) best.push_back(std::move(all[i].second));
  return best;
}

}  // namespace shrank
