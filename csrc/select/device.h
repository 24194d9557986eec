// What the cost model knows of a GPU.
#pragma once

#include <array>
#include <string>
#include <string_view>

namespace shrank {

struct Device {
  std::string_view name;           // as people say it: "H100"
  std::string_view reported_name;  // as the CUDA runtime says it
  int arch;                        // 90: compute capability 9.0
  int sms;
  double bandwidth;      // bytes/s that a device copy reaches, bytes read and bytes written both counted
  double flops_half;     // FLOP/s of a large bf16 or fp16 product: tensor cores, fp32 accumulation, no sparsity
  double flops_float32;  // on CUDA cores: PyTorch leaves TF32 off
  double flops_float64;  // on tensor cores where they do fp64, as cuBLAS
  double l2_bytes;
  int smem_per_block;  // the opt-in maximum
  double launch_us;    // per kernel on a stream
  double node_us;      // per kernel in a replayed CUDA graph
  const char* source;  // of bandwidth and FLOP/s
};

// The only card measured is an H200: 4.3 TB/s (device copy) and 790 TFLOP/s (8192-cube bf16 product, random data)
// of its datasheet's 4.8 and 989. Every other rate below is a datasheet's, or a clock's, times these shares: assumed.
inline constexpr double kBandwidthShare = 4.3 / 4.8;
inline constexpr double kFlopsShare = 790.0 / 989.4;
inline constexpr const char* kFromDatasheet = "datasheet x what an H200 reaches of its own; not measured";
inline constexpr const char* kFromClocks = "clocks and widths x what an H200 reaches of its own; not measured";
inline constexpr const char* kIntegrated = "clocks x what an H200 reaches of its own, bandwidth assumed; not measured";
inline constexpr const char* kSlice = "a share of the whole card's clocks and widths, as MIG deals them; not measured";

// Integrated GPUs share the system's memory, and the runtime reports no memory clock (0). Datasheets: Jetson AGX Orin
// 204.8 GB/s, Jetson Thor and GB10 273 GB/s. The least of them.
inline constexpr double kIntegratedBandwidth = kBandwidthShare * 204.8e9;

// Reported for an H100 (Hazy Research, on their Llama megakernel); assumed for all.
inline constexpr double kLaunchUs = 2.1;
inline constexpr double kNodeUs = 1.3;

// Shared memory: CUDA C++ Programming Guide, technical specifications per compute capability.
inline constexpr int kSmem80 = 163 * 1024;
inline constexpr int kSmem89 = 99 * 1024;
inline constexpr int kSmem90 = 227 * 1024;
inline constexpr double kMiB = 1024.0 * 1024.0;

inline constexpr std::array<Device, 6> kDevices{{
    // 80 GB SXM. NVIDIA A100 datasheet: 2039 GB/s, 312 / 19.5 / 19.5 (fp64 tensor) TFLOPS. A100 whitepaper: 108 SMs,
    // 40 MB L2.
    {"A100", "NVIDIA A100-SXM4-80GB", 80, 108, kBandwidthShare * 2.039e12, kFlopsShare * 312e12, kFlopsShare * 19.5e12,
     kFlopsShare * 19.5e12, 40 * kMiB, kSmem80, kLaunchUs, kNodeUs, kFromDatasheet},
    // NVIDIA L40S datasheet: 864 GB/s, 362.05 / 91.6 TFLOPS, 142 SMs. fp64 is 1/64 of fp32 on Ada. L2: 96 MB, as the
    // L40, which is the same chip with the same SMs.
    {"L40S", "NVIDIA L40S", 89, 142, kBandwidthShare * 0.864e12, kFlopsShare * 362.05e12, kFlopsShare * 91.6e12,
     kFlopsShare * 1.43e12, 96 * kMiB, kSmem89, kLaunchUs, kNodeUs, kFromDatasheet},
    // NVIDIA Ada whitepaper, appendix A: 1008 GB/s, 165.2 (fp16, fp32 accumulation: half the rate of the L40S per SM) /
    // 82.6 TFLOPS, 128 SMs, 72 MB L2. fp64 is 1/64 of fp32.
    {"RTX 4090", "NVIDIA GeForce RTX 4090", 89, 128, kBandwidthShare * 1.008e12, kFlopsShare * 165.2e12,
     kFlopsShare * 82.6e12, kFlopsShare * 1.29e12, 72 * kMiB, kSmem89, kLaunchUs, kNodeUs, kFromDatasheet},
    // SXM. NVIDIA H100 datasheet: 3.35 TB/s, 989.4 / 67 / 67 (fp64 tensor) TFLOPS. H100 whitepaper: 132 SMs, 50 MB L2.
    {"H100", "NVIDIA H100 80GB HBM3", 90, 132, kBandwidthShare * 3.35e12, kFlopsShare * 989.4e12, kFlopsShare * 67e12,
     kFlopsShare * 67e12, 50 * kMiB, kSmem90, kLaunchUs, kNodeUs, kFromDatasheet},
    // SXM. Bandwidth and bf16 are measured. fp32 and fp64: NVIDIA H200 datasheet, the H100's. L2: as reported.
    {"H200", "NVIDIA H200", 90, 132, 4.3e12, 790e12, kFlopsShare * 67e12, kFlopsShare * 67e12, 60 * kMiB, kSmem90,
     kLaunchUs, kNodeUs, "bandwidth and bf16 product measured; fp32 and fp64: datasheet x 0.8, not measured"},
    // In an HGX, 1000 W. NVIDIA Blackwell architecture technical brief: 8 TB/s, 2250 / 80 / 40 TFLOPS. 148 SMs and
    // 126 MB L2 as the runtime reports them.
    {"B200", "NVIDIA B200", 100, 148, kBandwidthShare * 8e12, kFlopsShare * 2250e12, kFlopsShare * 80e12,
     kFlopsShare * 40e12, 126 * kMiB, kSmem90, kLaunchUs, kNodeUs, kFromDatasheet},
}};

// Of an SM, at work: what its fp32 rate says (CUDA C++ Programming Guide, throughput of arithmetic instructions).
double clock_hz(const Device& d);

// By either name; case, spaces, dashes and a leading NVIDIA do not count: "h200", "rtx4090". nullptr if it is not in
// the table, as slower namesakes (H100 PCIe, RTX 4090 D, a MIG slice) are not.
const Device* find_device(std::string_view name);

// find_device, or std::invalid_argument with the names there are.
const Device& device_named(std::string_view name);

// From what the runtime reports (cudaDevAttrClockRate, MemoryClockRate, GlobalMemoryBusWidth, L2CacheSize,
// MaxSharedMemoryPerBlockOptin). A known name wins; any other must outlive the Device. Of a MIG slice ("NVIDIA A100 MIG
// 1g.10gb") the runtime reports the slice's SMs and the whole card's memory bus.
Device from_attributes(std::string_view name, int major, int minor, int sms, int clock_khz, int memory_clock_khz,
                       int bus_bits, int l2_bytes, int smem_per_block);

}  // namespace shrank
