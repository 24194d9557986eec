#include "tile_cost.h"

#include <cmath>

#include "cost.h"
#include "kernel_slots.h"

namespace shrank {
namespace {

int warps(const LinearTile& tile) { return tile.threads() / 32; }

// Of a thread, for `rows` rows of a panel.
double copies(const LinearTile& tile, int rows) { return rows * double{LinearTile::kPanelRow / 16} / tile.threads(); }

// Sums of `columns` columns, to which a panel of `rows` rows comes.
Phase step(const LinearTile& tile, int columns, int pairs, int rows) {
  Phase phase = products_of(tile, columns, pairs);
  const double own = kPanelStep.own + (pairs - 1) * kSecondPairSlots;
  phase.slots += warps(tile) * (own + kPanelStep.per_copy * copies(tile, rows));
  return phase;
}

}  // namespace

Phase products_of(const LinearTile& tile, int columns, int pairs) {
  const int fragments_m = tile.block_m / tile.warps_m() / 16, fragments_n = columns / LinearTile::kWarpsN / 8 / pairs;
  Phase phase;
  phase.slots = warps(tile) * pairs * product_slots(fragments_m, fragments_n);
  phase.products = double{LinearTile::kPanel} * tile.block_m * columns;
  return phase;
}

Phase down_step(const LinearTile& tile) { return step(tile, tile.max_rank, 1, tile.block_m + tile.max_rank); }

double window_slots(const ConvTile& conv) {
  const LinearTile& tile = conv.tile;
  const double of_x = copies(tile, tile.block_m), of_down = copies(tile, tile.max_rank);
  const auto step = [&](const StepSlots& slots, double filter) {
    return warps(tile) * (slots.own + slots.per_copy * of_x + filter * of_down);
  };
  switch (conv.gather) {
    case Gather::chunks: return step(kListedStep, kPanelStep.per_copy);
    case Gather::analytic: return step(kAnalyticStep, kAnalyticFilterSlots);
    case Gather::numbers: return step({kAnalyticStep.own, kNumberSlots * 8}, kNumberSlots * 8);
    case Gather::depthwise: break;  // it has no steps
  }
  return 0;
}

Phase load_step(const LinearTile& tile) {
  Phase phase;
  phase.slots = warps(tile) * kPanelStep.per_copy * copies(tile, tile.block_m);
  return phase;
}

Phase rounding_of_h(const LinearTile& tile) {
  Phase phase;
  phase.slots = tile.block_m / 16.0 * tile.max_rank / 8 * kRoundSlots;
  return phase;
}

Phase up_step(const LinearTile& tile) {
  const int rows_of_h = tile.holds_h() ? 0 : tile.pairs() * tile.block_m;
  return step(tile, LinearTile::kBlockN, tile.pairs(), LinearTile::kBlockN + rows_of_h);
}

double rank_panels(const LinearTile& tile, double rank) {
  return tile.holds_h() && tile.pairs() == 1 ? tile.h_panels() : std::ceil(rank / LinearTile::kPanel);
}

Phase up_steps(const LinearTile& tile, double tiles, double rank, double width) {
  const double panels = tiles * rank_panels(tile, rank);
  Phase phase = up_step(tile) * panels;
  const int rows_of_h = tile.holds_h() ? 0 : tile.pairs() * tile.block_m;
  phase.l2_bytes = width * tiles * (LinearTile::kBlockN + rows_of_h) * rank;
  phase.wait_us = panels * kL2LatencyUs / (tile.up_stages() - 1);
  return phase;
}

namespace {

// Of a tile of y.
double numbers_of(const LinearTile& tile) { return tile.block_m * double(tile.block_n()); }

// Of a thread, by eights.
double eights_of(const LinearTile& tile) { return numbers_of(tile) / 8 / tile.threads(); }

}  // namespace

Phase backward_end_of(const LinearTile& tile, const LinearProblem& p) {
  const double moved = numbers_of(tile) * bytes(p.dtype),
               of_pair = kStoreSlots + p.bias * kBiasSlots + kRowSumSlots + p.pivoted * kPivotSlots;
  Phase phase;
  phase.slots = warps(tile) * eights_of(tile) *
                (tile.pairs() * of_pair + kResidualSlots + derivative_slots(p.activation) +
                 (tile.pairs() - 1) * (activation_slots(p.activation) + 2 * kProductSlots));
  phase.dram_bytes = (1 + tile.pairs()) * moved;
  phase.l2_bytes = moved;
  return phase;
}

Phase end_of(const LinearTile& tile, const LinearProblem& p) {
  const double moved = numbers_of(tile) * bytes(p.dtype);
  Phase phase;
  phase.slots = warps(tile) * eights_of(tile) *
                (kStoreSlots + tile.pairs() * p.bias * kBiasSlots + activation_slots(p.activation) +
                 p.residual * kResidualSlots + (tile.pairs() - 1) * kProductSlots + p.pivoted * kPivotSlots);
  phase.dram_bytes = moved * (1 + p.residual);
  phase.l2_bytes = p.residual ? moved : 0;
  return phase;
}

}  // namespace shrank
