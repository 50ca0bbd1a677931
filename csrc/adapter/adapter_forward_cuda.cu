// The forward of adapters, tile by tile; see adapter_cuda.cu.
#include "adapter/adapter_block.cuh"

namespace mmk::adapter {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const __grid_constant__ Adapter d) {
  const Block<T> block(d, 1);
  constexpr int V = Block<T>::V;
  const int chunks = block.chunks(d.channels);
  if (block.adapter > d.adapters + 1) return;
  float* statistics = d.statistics;
  const float columns = static_cast<float>(d.channels);
  if (d.resident || d.norm_weight.data) {
    PerPiece<Moments> moments;
    for (int k = 0; k < chunks; ++k) {
      if (d.resident) {
        block.fill_chunk(block.kept + k * block.row_chunk, k, kComputed,
                         [&](int own, int row, int64_t, int c, int valid, float (&s)[V]) {
                           block.load_s(s, row, c, valid);
                           if (d.norm_weight.data) moments.change(own, [&](Moments& of) { of.add(s, valid); });
                         });
      } else {
        block.each_piece(k, [&](int own, int row, int64_t, int c, int valid) {
          float s[V];
          block.load_s(s, row, c, valid);
          moments.change(own, [&](Moments& of) { of.add(s, valid); });
        });
      }
    }
    if (d.norm_weight.data) {
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        if (!block.has(own)) continue;
        Moments& all = moments.values[own];
        all.gather();
        const int row = block.row(own);
        const int64_t m = block.numbers[row];
        if (threadIdx.x % kPieces != 0 || m < 0) continue;
        const float rstd = 1.0f / sqrtf(all.squares / columns + d.eps);
        statistics[m] = block.fact(kMean, row) = all.mean;
        statistics[d.rows + m] = block.fact(kRstd, row) = rstd;
      }
      statistics += 2 * d.rows;
    }
    __syncthreads();
  }
  if (block.known) block.down(false);
  PerPiece<Moments> moments;
  const bool normed = d.out_weight.data;
  auto result = [&](int own, int row, int64_t m, int c, int valid, float (&y)[V]) {
    block.finish(y, row, c, valid);
    if (normed) {
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = to_float(from_float<T>(y[i]));
      moments.change(own, [&](Moments& of) { of.add(y, valid); });
      if (d.resident) {
        store_elements<T, V>(block.at(block.kept + c / Block<T>::kWidth * block.row_chunk, row, c % Block<T>::kWidth),
                             0, y);
        return;
      }
    }
    block.store_dense(d.out, m, c, y, valid);
  };
  if (block.known) {
    block.template up<true>(block.hidden, d.w_up, result, [](int) {});
  } else {
    for (int k = 0; k < chunks; ++k) {
      block.each_piece(k, [&](int own, int row, int64_t m, int c, int valid) {
        float y[V] = {};
        result(own, row, m, c, valid, y);
      });
    }
  }
  if (!normed) return;
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    if (!block.has(own)) continue;
    Moments& all = moments.values[own];
    all.gather();
    all.squares = 1.0f / sqrtf(all.squares / columns + d.out_eps);
    const int64_t m = block.numbers[block.row(own)];
    if (threadIdx.x % kPieces != 0 || m < 0) continue;
    statistics[m] = all.mean;
    statistics[d.rows + m] = all.squares;
  }
  // Every thread reads what it has written itself.
  for (int k = 0; k < chunks; ++k) {
    block.each_piece(k, [&](int own, int row, int64_t m, int c, int valid) {
      const Moments of = moments.get(own);
      float y[V];
      if (d.resident) {
        load_piece<T, V>(y, block.at(block.kept + k * block.row_chunk, row, c - k * Block<T>::kWidth), valid, true);
      } else {
        block.load_dense(y, d.out, m, c, valid);
      }
      block.normalise(y, of.mean, of.squares, d.out_weight, d.out_bias, c, valid);
      block.store_dense(d.out, m, c, y, valid);
    });
  }
}

}  // namespace
}  // namespace mmk::adapter

int mmk_adapter_forward(mmk::Dtype dtype, const mmk::adapter::Adapter* d, int64_t tiles, void* stream) {
  return mmk::with_dtype(dtype, [&](auto zero) {
    const int64_t bytes = mmk::adapter::shared_bytes(dtype, d->channels, d->bottleneck, d->tile, d->resident, false);
    return mmk::launch(mmk::adapter::forward_kernel<decltype(zero)>, dim3(static_cast<unsigned>(tiles)),
                       dim3(mmk::adapter::kThreads), bytes, stream, *d);
  });
}
