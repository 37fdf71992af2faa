#include "cudnn_attention.h"

#ifndef LOCKSTEP_HAVE_CUDNN_FRONTEND

namespace lockstep::bench {
CudnnAttention cudnn_attention(const tensor::Context&, const CudnnAttentionCase&) {
  CudnnAttention none;
  none.problem = "built without the frontend (tools/cudnn_frontend.sh)";
  return none;
}
}  // namespace lockstep::bench

#else

#include <cudnn_frontend.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include "tensor/cuda_check.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // of the frontend's dynamic loading
}

namespace lockstep::bench {
namespace {

namespace fe = cudnn_frontend;
using tensor::Device;
using tensor::DType;
using tensor::Tensor;
using Attributes = std::shared_ptr<fe::graph::Tensor_attributes>;

enum Uid : std::int64_t { kQ = 1, kK, kV, kOut, kStats, kDOut, kDQ, kDK, kDV };

void check(fe::error_t error) {
  if (error.is_bad()) throw std::runtime_error(error.get_message());
}

cudnnHandle_t open(cudaStream_t stream) {
  if (fe::cudnn_dlhandle == nullptr)
    for (const char* path : {"libcudnn.so.9", "/usr/local/cuda/lib64/libcudnn.so.9"})
      if (fe::cudnn_dlhandle == nullptr) fe::cudnn_dlhandle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (fe::cudnn_dlhandle == nullptr) throw std::runtime_error("libcudnn.so.9 was not found");
  static cudnnHandle_t handle = nullptr;
  if (handle == nullptr && fe::detail::create_handle(&handle) != CUDNN_STATUS_SUCCESS)
    throw std::runtime_error("no cuDNN handle");
  fe::detail::set_stream(handle, stream);
  return handle;
}

// A graph that is built, and what it needs to run.
struct Graph {
  fe::graph::Graph graph;
  Tensor workspace;

  Graph() {
    graph.set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
  }
  void build(cudnnHandle_t handle) {
    check(graph.build(handle, {fe::HeurMode_t::A}));
    std::int64_t bytes = 0;
    check(graph.get_workspace_size(bytes));
    workspace = Tensor(Device::kCuda, DType::kE4m3, {std::max<std::int64_t>(bytes, 1)});
  }
};

}  // namespace

CudnnAttention cudnn_attention(const tensor::Context& ctx, const CudnnAttentionCase& c) {
  CudnnAttention a;
  try {
    const cudnnHandle_t handle = open(tensor::stream_of(ctx));
    const auto version = fe::detail::get_backend_version();
    a.version = fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
    const std::int64_t T = c.sequences * c.length;
    a.out = Tensor(Device::kCuda, DType::kBf16, {T, c.H, c.K});
    a.stats = Tensor(Device::kCuda, DType::kFp32, {T, c.H});
    a.d_q = Tensor(Device::kCuda, DType::kBf16, {T, c.H, c.K});
    a.d_k = Tensor(Device::kCuda, DType::kBf16, {T, c.J, c.K});
    a.d_v = Tensor(Device::kCuda, DType::kBf16, {T, c.J, c.K});
    std::unordered_map<std::int64_t, void*> memory{{kQ, c.q.data},
                                                   {kK, c.k.data},
                                                   {kV, c.v.data},
                                                   {kOut, a.out.view().data},
                                                   {kStats, a.stats.view().data},
                                                   {kDOut, c.d_out.data},
                                                   {kDQ, a.d_q.view().data},
                                                   {kDK, a.d_k.view().data},
                                                   {kDV, a.d_v.view().data}};

    // Of [sequence, head, token, column], as they lie.
    const auto place = [&](const Attributes& t, Uid uid, std::int64_t heads) {
      t->set_uid(uid)
          .set_dim({c.sequences, heads, c.length, c.K})
          .set_stride({c.length * heads * c.K, c.K, heads * c.K, 1});
    };
    const auto place_stats = [&](const Attributes& t) {
      t->set_uid(kStats)
          .set_dim({c.sequences, c.H, c.length, 1})
          .set_stride({c.H * c.length, c.length, 1, 1})
          .set_data_type(fe::DataType_t::FLOAT);
    };
    const auto input = [&](Graph& g, Uid uid, std::int64_t heads) {
      Attributes t = g.graph.tensor(fe::graph::Tensor_attributes());
      place(t, uid, heads);
      return t;
    };
    const auto run = [ctx, handle, memory](const std::shared_ptr<Graph>& g) {
      return [=]() mutable { check(g->graph.execute(handle, memory, g->workspace.view().data)); };
    };

    auto forward = std::make_shared<Graph>();
    {
      Graph& g = *forward;
      auto [out, stats] = g.graph.sdpa(input(g, kQ, c.H), input(g, kK, c.J), input(g, kV, c.J),
                                       fe::graph::SDPA_attributes()
                                           .set_generate_stats(true)
                                           .set_causal_mask(true)
                                           .set_attn_scale(static_cast<float>(c.scale)));
      out->set_output(true);
      place(out, kOut, c.H);
      stats->set_output(true);
      place_stats(stats);
      g.build(handle);
    }
    auto backward = std::make_shared<Graph>();
    {
      Graph& g = *backward;
      Attributes stats = g.graph.tensor(fe::graph::Tensor_attributes());
      place_stats(stats);
      auto [d_q, d_k, d_v] = g.graph.sdpa_backward(
          input(g, kQ, c.H), input(g, kK, c.J), input(g, kV, c.J), input(g, kOut, c.H),
          input(g, kDOut, c.H), stats,
          fe::graph::SDPA_backward_attributes().set_causal_mask(true).set_attn_scale(
              static_cast<float>(c.scale)));
      d_q->set_output(true);
      place(d_q, kDQ, c.H);
      d_k->set_output(true);
      place(d_k, kDK, c.J);
      d_v->set_output(true);
      place(d_v, kDV, c.J);
      g.build(handle);
    }
    a.forward = run(forward);
    a.backward = run(backward);
  } catch (const std::exception& e) {
    a.problem = e.what();
  }
  return a;
}

}  // namespace lockstep::bench

#endif
