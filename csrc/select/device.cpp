#include "device.h"

#include <cctype>
#include <stdexcept>

#include "vocabulary.h"

namespace shrank {
namespace {

// "NVIDIA A100-SXM4-80GB" -> "a100sxm480gb"
std::string normalized(std::string_view name) {
  std::string plain;
  for (unsigned char c : name)
    if (std::isalnum(c)) plain += static_cast<char>(std::tolower(c));
  constexpr std::string_view brand = "nvidia";
  return plain.compare(0, brand.size(), brand) == 0 ? plain.substr(brand.size()) : plain;
}

// FLOPs per SM and clock, dense, a fused multiply-add counted as two. Each row times SMs times boost clock gives the
// datasheet figure of its cards: 8.0 A100, 8.9 L40S, 9.0 H100, 10.0 B200, 12.0 RTX PRO 6000.
struct Rates { int half, float32, float64; };

Rates rates(int arch) {
  switch (arch) {
    case 80: return {2048, 128, 128};
    case 90: return {4096, 256, 256};
    case 100: return {8192, 256, 128};
    case 103: return {8192, 256, 4};
    case 86:
    case 87:
    case 89:
    case 120:
    case 121: return {1024, 256, 4};
  }
  // An arch nobody has listed yet is at least an RTX card; one before 8.0 has that much at most.
  return {1024, 128, 4};
}

// What a MIG slice has of the card's memory bandwidth; 1 if it is no slice. The digit before the g of its name counts
// the slices of compute; of the 8 of memory, those have 1, 2, 4, 4 and 8 at least (NVIDIA MIG user guide, profiles).
double memory_share(std::string_view name) {
  constexpr std::string_view mark = " MIG ";
  const std::size_t at = name.find(mark);
  if (at == std::string_view::npos || at + mark.size() >= name.size()) return 1;
  switch (name[at + mark.size()]) {
    case '1': return 1 / 8.0;
    case '2': return 2 / 8.0;
    case '3':
    case '4': return 4 / 8.0;
  }
  return 1;
}

}  // namespace

double clock_hz(const Device& d) { return d.flops_float32 / (d.sms * static_cast<double>(rates(d.arch).float32)); }

const Device* find_device(std::string_view name) {
  const std::string wanted = normalized(name);
  for (const Device& device : kDevices)
    if (normalized(device.name) == wanted || normalized(device.reported_name) == wanted) return &device;
  return nullptr;
}

const Device& device_named(std::string_view name) {
  if (const Device* device = find_device(name)) return *device;
  std::array<std::string_view, kDevices.size()> names;
  for (std::size_t i = 0; i < names.size(); ++i) names[i] = kDevices[i].name;
  throw std::invalid_argument(unknown_name("gpu", name, names));
}

// bandwidth = 2 (both edges of the memory clock) x clock x bus width; FLOP/s = SMs x clock x FLOPs per SM and clock.
// For the cards of the table this comes within 10 % of the datasheet: tensor cores run below the boost clock.
Device from_attributes(std::string_view name, int major, int minor, int sms, int clock_khz, int memory_clock_khz,
                       int bus_bits, int l2_bytes, int smem_per_block) {
  if (const Device* known = find_device(name)) return *known;
  const int arch = 10 * major + minor;
  const Rates per_clock = rates(arch);
  // GeForce cards accumulate in fp32 at half the rate of their professional siblings (Ada whitepaper, appendix A).
  const double half = name.find("GeForce") == std::string_view::npos ? 1.0 : 0.5;
  const double clocks = kFlopsShare * sms * clock_khz * 1e3;
  const double share = memory_share(name);
  const double reported = kBandwidthShare * 2 * memory_clock_khz * 1e3 * bus_bits / 8;
  const double bandwidth = reported > 0 ? reported * share : kIntegratedBandwidth;
  const char* const source = reported > 0 ? share < 1 ? kSlice : kFromClocks : kIntegrated;
  return {name,
          name,
          arch,
          sms,
          bandwidth,
          clocks * per_clock.half * half,
          clocks * per_clock.float32,
          clocks * per_clock.float64,
          static_cast<double>(l2_bytes),
          smem_per_block,
          kLaunchUs,
          kNodeUs,
          source};
}

}  // namespace shrank
