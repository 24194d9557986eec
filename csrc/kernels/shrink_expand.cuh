// h = x down^T, then y = activation(h up^T + bias) + residual, for a few rows of x: as many bytes of weights on their way
// as the memory needs, and nothing between them and the tensor cores. Of two pairs of factors activation(gate) value; of
// several layers of one x a y each.
#pragma once

#include <utility>

#include "activation.cuh"
#include "shrink_expand.h"
#include "tile.cuh"

namespace shrank {

// Of 16 rows of a factor, the two that a lane has.
struct TwoRows {
  int low, high;

  // From `row` on. Rows that there are not repeat the last one: what is made of them is not stored.
  SHRANK_DEVICE static TwoRows from(int row, int rows) {
    const int first = row + arch::lane_index() / 4, last = rows - 1;
    return {min_of(first, last), min_of(first + 8, last)};
  }
};

// 16 rows of a factor, some chunks of them in registers, as the tensor cores' 16-row operand. A lane has 8 neighbouring
// columns of rows g and g + 8: two steps of 16 of a permuted k. The rows of x are read with the same permutation, so that
// nothing is exchanged.
template <typename T, int BATCH> struct WeightRows {
  static constexpr int kChunk = ShrinkExpandTile::kChunk, kBatch = BATCH;
  using Words = arch::Pack<uint32_t, 4>;

  const T *low, *high;  // the lane's first numbers of its two rows
  int left;  // columns from there to the end of what the warp takes

  SHRANK_DEVICE WeightRows(const void* factor, const TwoRows& rows, int columns, int begin, int end) {
    const int column = begin + arch::lane_index() % 4 * 8;
    const T* const first = static_cast<const T*>(factor) + column;
    low = first + arch::multiply_wide(rows.low, columns);
    high = first + arch::multiply_wide(rows.high, columns);
    left = end - column;
  }

  struct Batch { Words low[kBatch], high[kBatch]; };

  // Those of chunk `first` and the next ones; zeros beyond the end.
  SHRANK_DEVICE void load(Batch& batch, int first) const {
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int column = (first + i) * kChunk;
      batch.low[i] = arch::load_once_if(column < left, low + column);
      batch.high[i] = arch::load_once_if(column < left, high + column);
    }
  }

  // The lines of all its rows, of 128 bytes, on their way to L2.
  SHRANK_DEVICE void prefetch() const {
    for (int column = 0; column < left; column += 2 * kChunk) {
      arch::prefetch_if(true, low + column);
      arch::prefetch_if(true, high + column);
    }
  }
};

// What a warp sums up: 16 rows of a factor by some rows of x, as arch::multiply_add deals them to the lanes: with g =
// lane / 4 and t = lane % 4, [0..1] row g of the factor and rows 2t, 2t + 1 of 8 rows of x, [2..3] row g + 8.
template <int TOKENS> struct TokenSums {
  static constexpr int kEights = TOKENS / 8;
  float item[kEights][4] = {};

  // Calls visit(eight, number, row of x, row of the factor) for each of the lane's sums.
  template <typename Visit> SHRANK_DEVICE static void for_each(const Visit& visit) {
    const int lane = arch::lane_index();
#pragma unroll
    for (int eight = 0; eight < kEights; eight++) {
#pragma unroll
      for (int i = 0; i < 4; i++) visit(eight, i, eight * 8 + lane % 4 * 2 + i % 2, lane / 4 + i / 2 * 8);
    }
  }
};

// The rows of x that a block has: `count` from `first` on.
template <int TOKENS> struct TokenRows {
  int first, count;

  SHRANK_DEVICE TokenRows(int group, int M) : first(group * TOKENS), count(min_of(M - first, TOKENS)) {}

  // Of 8 rows, the lane's in the other operand. Rows that there are not repeat the last one.
  SHRANK_DEVICE int of_lane(int eight) const { return min_of(eight * 8 + arch::lane_index() / 4, count - 1); }
};

// sums += the rows of a batch times rows of x, which `load(eight, chunk of the batch)` gives.
template <typename T, int BATCH, int TOKENS, typename Load>
SHRANK_DEVICE void multiply_batch(TokenSums<TOKENS>& sums, const typename WeightRows<T, BATCH>::Batch& batch,
                                  const Load& load) {
  constexpr int kBatch = BATCH;
#pragma unroll
  for (int eight = 0; eight < TokenSums<TOKENS>::kEights; eight++) {
    arch::Pack<uint32_t, 4> x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) x[i] = load(eight, i);
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const uint32_t (&l)[4] = batch.low[i].item, (&h)[4] = batch.high[i].item;
      arch::multiply_add<T>(sums.item[eight], {l[0], h[0], l[1], h[1]}, x[i].item[0], x[i].item[1]);
      arch::multiply_add<T>(sums.item[eight], {l[2], h[2], l[3], h[3]}, x[i].item[2], x[i].item[3]);
    }
  }
}

// All chunks of a warp's rows of PAIRS factors, two batches of each on their way, which begin() asks for. `load` gets the
// pair and the number of the batch's first chunk before what multiply_batch passes.
template <typename T, int BATCH, int PAIRS> struct WeightStream {
  using Rows = WeightRows<T, BATCH>;
  Rows rows[PAIRS];
  typename Rows::Batch first[PAIRS], second[PAIRS];

  template <typename... Of> SHRANK_DEVICE explicit WeightStream(const Of&... of) : rows{of...} {}

  SHRANK_DEVICE void begin() {
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
      rows[pair].load(first[pair], 0);
      rows[pair].load(second[pair], BATCH);
    }
  }

  template <int TOKENS, typename Load>
  SHRANK_DEVICE void multiply(TokenSums<TOKENS> (&sums)[PAIRS], int chunks, const Load& load) {
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk += 2 * BATCH) {
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++) {
        multiply_batch<T, BATCH>(sums[pair], first[pair],
                                 [&](int eight, int i) { return load(pair, chunk, eight, i); });
        rows[pair].load(first[pair], chunk + 2 * BATCH);
        multiply_batch<T, BATCH>(sums[pair], second[pair],
                                 [&](int eight, int i) { return load(pair, chunk + BATCH, eight, i); });
        rows[pair].load(second[pair], chunk + 3 * BATCH);
      }
    }
  }
};

// The blocks of a launch are dealt to its parts, one part after the other: which is a block's, and which of that part's
// blocks it is.
template <int PARTS> struct Share {
  int part = 0, block;

  // A block has `each` of the rows of a factor, of which a part has rows_of(part).
  template <typename RowsOf> SHRANK_DEVICE Share(int each, const RowsOf& rows_of) : block(arch::block_x()) {
#pragma unroll
    for (int i = 0; i < PARTS - 1; i++) {
      const int blocks = ceil_div(rows_of(i), each);
      if (part == i && block >= blocks) part++, block -= blocks;
    }
  }
};

// A block has 16 rows of a pair's down; its warps, and the blocks of the other splits, share the columns.
template <typename T, int TOKENS, int FORM, int LAYERS> struct Shrink {
  using Params = ShrinkExpandParams;
  static constexpr int kThreads = ShrinkExpandTile::kShrinkThreads;
  static constexpr int kSharedBytes = ShrinkExpandTile{TOKENS}.shrink_bytes();
  static constexpr int kPairs = pairs_of(static_cast<Form>(FORM));
  static constexpr int kWarps = ShrinkExpandTile::kShrinkWarps, kChunk = ShrinkExpandTile::kChunk;
  static constexpr int kBatch = ShrinkExpandTile{TOKENS}.shrink_batch();
  using Sums = TokenSums<TOKENS>;

  // Where a block's rows are.
  struct Part {
    FewRowsPair pair;
    int row;

    SHRANK_DEVICE static Part here(const Params& params) {
      const Share<kPairs * LAYERS> share(ShrinkExpandTile::kRows, [&](int part) { return params.pair[part].R; });
      Part part{params.pair[0], share.block * ShrinkExpandTile::kRows};
#pragma unroll
      for (int i = 1; i < kPairs * LAYERS; i++)
        if (share.part == i) part.pair = params.pair[i];
      return part;
    }
  };

  SHRANK_DEVICE static void run(const Params& params) {
    const int warp = arch::warp_index(), lane = arch::lane_index(), groups = ceil_div(params.M, TOKENS);
    const Part part = Part::here(params);
    const int split = arch::block_y() / groups;
    if (LAYERS > 1 && split >= part.pair.splits) return;  // another layer has more splits, and its blocks wait
    const TokenRows<TOKENS> tokens(arch::block_y() % groups, params.M);
    const int chunks = ceil_div(ceil_div(params.K, kChunk), part.pair.splits * kWarps);
    const int begin = (split * kWarps + warp) * chunks * kChunk, end = min_of(begin + chunks * kChunk, params.K);
    WeightStream<T, kBatch, 1> weights(
        WeightRows<T, kBatch>(part.pair.down, TwoRows::from(part.row, part.pair.R), params.K, begin, end));
    weights.rows[0].prefetch();  // a hint, which may come before what writes them: L2 holds what is written last
    arch::grid_dependency_wait();
    arch::grid_dependency_launch();  // after the wait: what is complete for this grid is complete for the next
    weights.begin();
    Sums sums[1];
    const T* const x = static_cast<const T*>(params.x) + arch::multiply_wide(tokens.first, params.K) + begin +
                       lane % 4 * 8;
    weights.multiply(sums, chunks, [&](int, int chunk, int eight, int i) {
      const int column = (chunk + i) * kChunk;
      return arch::load_words_if(column < weights.rows[0].left,
                                 x + arch::multiply_wide(tokens.of_lane(eight), params.K) + column);
    });
    add_up(params, sums[0], part, split, tokens);
  }

  // The sums of the warps, always in the same order.
  SHRANK_DEVICE static void add_up(const Params& params, const Sums& sums, const Part& part, int split,
                                   const TokenRows<TOKENS>& tokens) {
    const int warp = arch::warp_index();
    const SharedAddress own = arch::dynamic_shared() + arch::lane_index() * 16;
    constexpr int kEightBytes = arch::kWarpSize * 16, kWarpBytes = Sums::kEights * kEightBytes;
#pragma unroll
    for (int eight = 0; eight < Sums::kEights; eight++) {
      const float (&four)[4] = sums.item[eight];
      arch::store_shared(own + warp * kWarpBytes + eight * kEightBytes,
                         arch::Pack<float, 4>{four[0], four[1], four[2], four[3]});
    }
    arch::sync_threads();
    for (int eight = warp; eight < Sums::kEights; eight += kWarps) {
      arch::Pack<float, 4> sum{};
#pragma unroll
      for (int of = 0; of < kWarps; of++) {
        const arch::Pack<float, 4> part = arch::load_shared_floats(own + of * kWarpBytes + eight * kEightBytes);
#pragma unroll
        for (int i = 0; i < 4; i++) sum.item[i] += part.item[i];
      }
      TokenSums<8>::for_each([&](int, int i, int token, int r) {
        const int m = eight * 8 + token, column = part.row + r;
        if (m < tokens.count && column < part.pair.R) store(params, part, split, tokens.first + m, column, sum.item[i]);
      });
    }
  }

  SHRANK_DEVICE static void store(const Params& params, const Part& part, int split, int m, int column, float sum) {
    const int64_t at = arch::multiply_wide(m, part.pair.R) + column;
    if (part.pair.splits == 1) arch::store(static_cast<T*>(part.pair.h) + at, arch::Pack<T, 1>{arch::round_to<T>(sum)});
    else
      arch::store(part.pair.sums + static_cast<int64_t>(split) * params.M * part.pair.R + at,
                  arch::Pack<float, 1>{sum});
  }
};

// A warp has 16 rows of each pair's up, all columns of them. Its weights, bias and residual are asked for while the first kernel
// runs, which has waited for all that may have written them.
template <typename T, int TOKENS, int FORM, int LAYERS> struct Expand {
  using Params = ShrinkExpandParams;
  static constexpr int kThreads = ShrinkExpandTile::kExpandThreads;
  static constexpr int kBlocksOfSm = ShrinkExpandTile::kExpandBlocks;  // each with weights on their way
  static constexpr ShrinkExpandTile kTile{TOKENS, static_cast<Form>(FORM)};
  static constexpr int kPairs = kTile.pairs(), kSharedBytes = kTile.expand_bytes();
  static constexpr bool kPivoted = has_pivots(kTile.form);
  static constexpr bool kMayBePlain = kPairs * LAYERS > 1;  // of several pairs those that have no order
  static constexpr int kChunk = ShrinkExpandTile::kChunk, kBatch = kTile.expand_batch();
  using Sums = TokenSums<TOKENS>;
  struct Places { TwoRows of[kPairs]; };

  // What a block computes: rows of a layer's up, from `first` on.
  struct Layer {
    FewRowsPair pair[kPairs];
    void* y;
    int N, first;

    SHRANK_DEVICE static Layer here(const Params& params) {
      const Share<LAYERS> share(ShrinkExpandTile::kExpandRows, [&](int layer) { return params.N[layer]; });
      Layer layer{{}, params.y[0], params.N[0], share.block * ShrinkExpandTile::kExpandRows};
#pragma unroll
      for (int pair = 0; pair < kPairs; pair++) layer.pair[pair] = params.pair[pair];
#pragma unroll
      for (int i = 1; i < LAYERS; i++)
        if (share.part == i) layer.pair[0] = params.pair[i], layer.y = params.y[i], layer.N = params.N[i];
      return layer;
    }

    // Of two pairs the larger one: rows of the other h have zeros behind them.
    SHRANK_DEVICE int rank() const { return kPairs == 1 ? pair[0].R : max_of(pair[0].R, pair[kPairs - 1].R); }

    SHRANK_DEVICE int64_t at(int m, int n) const { return arch::multiply_wide(m, N) + n; }
  };

  SHRANK_DEVICE static void run(const Params& params) {
    const Layer layer = Layer::here(params);
    const int row = layer.first + arch::warp_index() * ShrinkExpandTile::kRows;
    const Places places = places_of(layer, row);
    auto weights = weights_of(layer, row, places, std::make_integer_sequence<int, kPairs>{});
    weights.begin();
    const TokenRows<TOKENS> tokens(arch::block_y(), params.M);
    const Ends ends(params, layer, row, places, tokens);
    arch::grid_dependency_launch();
    arch::grid_dependency_wait();
    const SharedAddress h = arch::dynamic_shared();
    const int rank = layer.rank(), stride = h_row_bytes(rank);
#pragma unroll
    for (int pair = 0; pair < kPairs; pair++)
      stage_h(params, layer, layer.pair[pair], tokens, h + pair * TOKENS * stride, stride);
    arch::sync_threads();
    Sums sums[kPairs];
    const SharedAddress own = h + arch::lane_index() % 4 * 16;
    weights.multiply(sums, ceil_div(rank, kChunk), [&](int pair, int chunk, int eight, int i) {
      const int at = pair * TOKENS + tokens.of_lane(eight);
      return arch::load_shared_words(own + at * stride + (chunk + i) * kChunk * 2);
    });
    if constexpr (kPivoted) {
#pragma unroll
      for (int pair = 0; pair < kPairs; pair++)
        take_pivots(layer.pair[pair], sums[pair], places.of[pair], tokens, h + pair * TOKENS * stride, stride);
    }
    ends.finish(params, layer, sums, row, tokens);
  }

  // Of pivoted factors, the places of the lane's rows of y^T among those of h^T and then the others; without an order, all
  // are others.
  SHRANK_DEVICE static Places places_of(const Layer& layer, int row) {
    Places places{};
    if constexpr (!kPivoted) return places;
    const TwoRows rows = TwoRows::from(row, layer.N);
#pragma unroll
    for (int pair = 0; pair < kPairs; pair++) {
      const FewRowsPair& of = layer.pair[pair];
      const auto place_of = [&](int n) {
        const bool is_pivoted = !kMayBePlain || of.order;
        const int place = static_cast<int>(arch::load_word_if(is_pivoted, of.order + n));
        return is_pivoted ? place : of.R + n;
      };
      places.of[pair] = {place_of(rows.low), place_of(rows.high)};
    }
    return places;
  }

  // h in place of the sums of pivots, for which some row of up has taken part in vain.
  SHRANK_DEVICE static void take_pivots(const FewRowsPair& of, Sums& sums, const TwoRows& places,
                                        const TokenRows<TOKENS>& tokens, SharedAddress h, int stride) {
    Sums::for_each([&](int eight, int i, int m, int) {
      const int place = i < 2 ? places.low : places.high;
      if (m >= tokens.count || place >= of.R) return;
      const arch::Pack<uint32_t, 2> four = arch::load_shared_pair(h + m * stride + place / 4 * 8);
      sums.item[eight][i] = number_of_pair<T>(four, place % 4);
    });
  }

  template <int... I>
  SHRANK_DEVICE static WeightStream<T, kBatch, kPairs> weights_of(const Layer& layer, int row, const Places& places,
                                                                  std::integer_sequence<int, I...>) {
    if constexpr (kPivoted) {
      return WeightStream<T, kBatch, kPairs>(others_of(layer, layer.pair[I], places.of[I])...);
    } else {
      return WeightStream<T, kBatch, kPairs>(
          WeightRows<T, kBatch>(layer.pair[I].up, TwoRows::from(row, layer.N), layer.pair[I].R, 0, layer.pair[I].R)...);
    }
  }

  // Rows of up by their places: in place of those of pivots the first, if there is any.
  SHRANK_DEVICE static WeightRows<T, kBatch> others_of(const Layer& layer, const FewRowsPair& of,
                                                       const TwoRows& places) {
    const TwoRows others{max_of(places.low - of.R, 0), max_of(places.high - of.R, 0)};
    const bool has_others = layer.N > of.R || (kMayBePlain && !of.order);
    return WeightRows<T, kBatch>(of.up, others, of.R, 0, has_others ? of.R : 0);
  }

  SHRANK_DEVICE static int h_row_bytes(int rank) {
    constexpr int kColumns = ShrinkExpandTile::kHColumns;
    return ceil_div(rank, kColumns) * kColumns * 2 + ShrinkExpandTile::kHGap;
  }

  // The rows of a pair's h, rounded, and zeros behind them up to the last chunk of a batch.
  SHRANK_DEVICE static void stage_h(const Params& params, const Layer& layer, const FewRowsPair& pair,
                                    const TokenRows<TOKENS>& tokens, SharedAddress h, int stride) {
    const int pieces = (stride - ShrinkExpandTile::kHGap) / 16;
    for (int i = arch::thread_index(); i < tokens.count * pieces; i += kThreads) {
      const int m = i / pieces, piece = i % pieces;
      arch::Pack<uint32_t, 4> words{};
      if (piece * 8 < pair.R) words = eight_of_h(params, layer, pair, tokens.first + m, piece * 8);
      arch::store_shared(h + m * stride + piece * 16, words);
    }
  }

  SHRANK_DEVICE static arch::Pack<uint32_t, 4> eight_of_h(const Params& params, const Layer& layer,
                                                          const FewRowsPair& of, int m, int column) {
    const int64_t at = arch::multiply_wide(m, of.R) + column;
    uint32_t* const words_of_h = reinterpret_cast<uint32_t*>(static_cast<T*>(of.h) + at);
    if (of.splits == 1) return arch::load<uint32_t, 4>(words_of_h);
    float sums[8] = {};
    for (int split = 0; split < of.splits; split++) {
      const float* const part = of.sums + static_cast<int64_t>(split) * params.M * of.R + at;
      const arch::Pack<float, 4> low = arch::load<float, 4>(part), high = arch::load<float, 4>(part + 4);
#pragma unroll
      for (int i = 0; i < 4; i++) sums[i] += low.item[i], sums[i + 4] += high.item[i];
    }
    arch::Pack<uint32_t, 4> words;
#pragma unroll
    for (int i = 0; i < 4; i++) words.item[i] = arch::round_to_pair<T>(sums[2 * i], sums[2 * i + 1]);
    if (of.h && layer.first == 0) arch::store(words_of_h, words);  // for training
    return words;
  }

  // What comes to the sums of a lane.
  struct Ends {
    arch::Pack<T, 1> bias[kPairs][2] = {}, residual[Sums::kEights][4] = {};

    SHRANK_DEVICE Ends(const Params& params, const Layer& layer, int row, const Places& places,
                       const TokenRows<TOKENS>& tokens) {
      const int g = row + arch::lane_index() / 4;
      if constexpr (kPivoted) {
#pragma unroll
        for (int i = 0; i < kPairs * 2; i++) {
          const FewRowsPair& of = layer.pair[i / 2];
          const int place = i % 2 ? places.of[i / 2].high : places.of[i / 2].low;
          const void* const from = place < of.R ? of.pivot_bias : of.bias;
          const int at = place < of.R ? place : place - of.R;
          if (from && g + i % 2 * 8 < layer.N) bias[i / 2][i % 2] = arch::load<T, 1>(static_cast<const T*>(from) + at);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kPairs * 2; i++)
          if (const void* const from = layer.pair[i / 2].bias; from && g + i % 2 * 8 < layer.N)
            bias[i / 2][i % 2] = arch::load<T, 1>(static_cast<const T*>(from) + g + i % 2 * 8);
      }
      if (kPairs * LAYERS > 1 || !params.residual) return;
      Sums::for_each([&](int eight, int i, int m, int r) {
        if (m < tokens.count && row + r < layer.N)
          residual[eight][i] = arch::load<T, 1>(static_cast<const T*>(params.residual) +
                                                layer.at(tokens.first + m, row + r));
      });
    }

    SHRANK_DEVICE void finish(const Params& params, const Layer& layer, const Sums (&sums)[kPairs], int row,
                              const TokenRows<TOKENS>& tokens) const {
      with_activation(params.activation, [&](auto kind) {
        Sums::for_each([&](int eight, int i, int m, int r) {
          float z[kPairs];
#pragma unroll
          for (int pair = 0; pair < kPairs; pair++)
            z[pair] = sums[pair].item[eight][i] + arch::widen(bias[pair][i / 2].item[0]);
          float y = activate<T, decltype(kind)::value>(z[0]);
          if constexpr (kPairs == 2) y *= z[1];
          else y += arch::widen(residual[eight][i].item[0]);
          if (m < tokens.count && row + r < layer.N)
            arch::store(static_cast<T*>(layer.y) + layer.at(tokens.first + m, row + r),
                        arch::Pack<T, 1>{arch::round_to<T>(y)});
        });
      });
    }
  };
};

}  // namespace shrank
