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
Phase step(const LinearTile& tile, int columns, int rows) {
  Phase phase = products_of(tile, columns);
  phase.slots += warps(tile) * (kPanelStep.own + kPanelStep.per_copy * copies(tile, rows));
  return phase;
}

}  // namespace

Phase products_of(const LinearTile& tile, int columns) {
  const int fragments_m = tile.block_m / LinearTile::kWarpsM / 16, fragments_n = columns / tile.warps_n() / 8;
  Phase phase;
  phase.slots = warps(tile) * product_slots(fragments_m, fragments_n);
  phase.products = double{LinearTile::kPanel} * tile.block_m * columns;
  return phase;
}

Phase down_step(const LinearTile& tile) { return step(tile, tile.max_rank, tile.block_m + tile.max_rank); }

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
  return step(tile, LinearTile::kBlockN, LinearTile::kBlockN + (tile.holds_h() ? 0 : tile.block_m));
}

double rank_panels(const LinearTile& tile, double rank) {
  return tile.holds_h() ? tile.h_panels() : std::ceil(rank / LinearTile::kPanel);
}

Phase up_steps(const LinearTile& tile, double tiles, double rank, double width) {
  const double panels = tiles * rank_panels(tile, rank);
  Phase phase = up_step(tile) * panels;
  phase.l2_bytes = width * tiles * (LinearTile::kBlockN * rank + (tile.holds_h() ? 0 : tile.block_m * rank));
  phase.wait_us = panels * kL2LatencyUs / (tile.up_stages() - 1);
  return phase;
}

namespace {

// Of a thread, numbers of y by eights.
double eights_of(const LinearTile& tile) { return tile.block_m * double{LinearTile::kBlockN} / 8 / tile.threads(); }

}  // namespace

Phase backward_end_of(const LinearTile& tile, const LinearProblem& p) {
  const double numbers = tile.block_m * double{LinearTile::kBlockN} * bytes(p.dtype);
  Phase phase;
  phase.slots = warps(tile) * eights_of(tile) *
                (kStoreSlots + p.bias * kBiasSlots + kResidualSlots + derivative_slots(p.activation) + kRowSumSlots);
  phase.dram_bytes = 2 * numbers;
  phase.l2_bytes = numbers;
  return phase;
}

Phase end_of(const LinearTile& tile, const LinearProblem& p) {
  const double numbers = tile.block_m * double{LinearTile::kBlockN} * bytes(p.dtype);
  Phase phase;
  phase.slots = warps(tile) * eights_of(tile) *
                (kStoreSlots + p.bias * kBiasSlots + activation_slots(p.activation) + p.residual * kResidualSlots);
  phase.dram_bytes = numbers * (1 + p.residual);
  phase.l2_bytes = p.residual ? numbers : 0;
  return phase;
}

}  // namespace shrank
