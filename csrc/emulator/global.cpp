// Global memory: the buffers of the launch, to the byte, and who wrote what the kernel has written.
#include <limits>

#include "machine.h"

namespace shrank::emulator {
namespace {

struct Cell {
  int block = -1;  // that wrote it; -1: nobody in this launch
  int16_t thread = 0;
  uint32_t clock = 0;
  Site site = nullptr;
};

std::vector<std::vector<Cell>> written;  // of each writable buffer, for every two bytes

int block_number() {
  const Index3& grid = world.launch->grid;
  return static_cast<int>(world.block.x + grid.x * (world.block.y + grid.y * world.block.z));
}

// The buffer that holds the access; fatal if none does.
std::size_t find_buffer(const char* address, int bytes, bool write, const char* doing, Site site) {
  const auto& buffers = *world.buffers;
  int64_t nearest = std::numeric_limits<int64_t>::max();
  std::string found = "no buffer near " + std::to_string(reinterpret_cast<uintptr_t>(address));
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const Buffer& buffer = buffers[i];
    const auto* low = static_cast<const char*>(buffer.base);
    const char* high = low + buffer.bytes;
    if (address >= low && address + bytes <= high) return i;
    const int64_t distance = address < low ? low - address : address - high;
    if (distance >= nearest) continue;
    nearest = distance;
    found = buffer.name + " at byte " + std::to_string(address - low) + " of " + std::to_string(buffer.bytes);
  }
  fatal("global memory out of bounds", doing, site,
        std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes: " + found);
}

}  // namespace

void reset_global() {
  written.assign(world.buffers->size(), {});
  for (std::size_t i = 0; i < written.size(); ++i) {
    const Buffer& buffer = (*world.buffers)[i];
    if (buffer.writable) written[i].assign((buffer.bytes + kGranule - 1) / kGranule, {});
  }
}

void access_global(const void* address, int bytes, bool write, const char* doing, Site site) {
  const auto* at = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    fatal("misaligned global access", doing, site, std::to_string(bytes) + " bytes");
  }
  const std::size_t index = find_buffer(at, bytes, write, doing, site);
  const Buffer& buffer = (*world.buffers)[index];
  const Thread& thread = *world.running;
  if (write && !buffer.writable) fatal("write to a read-only buffer", doing, site, buffer.name);
  if (buffer.awaited && !thread.awaited) problem("access before grid_dependency_wait", doing, site, buffer.name);
  if (!buffer.writable) return;
  const int64_t offset = at - static_cast<const char*>(buffer.base);
  for (int64_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    Cell& cell = written[index][i];
    const auto place = [&] { return buffer.name + " at byte " + std::to_string(i * kGranule); };
    if (cell.block >= 0 && cell.block != block_number()) {
      problem(write ? "two blocks write one place" : "race: read of what another block wrote", doing, site, place(),
              cell.site, ("written by block " + std::to_string(cell.block)).c_str());
    } else if (cell.block >= 0 && !happened_before(cell.thread, cell.clock, thread.number)) {
      problem(write ? "race: write after unordered write" : "race: read after unordered write", doing, site, place(),
              cell.site, ("written by thread " + std::to_string(cell.thread)).c_str());
    } else if (!write && cell.block < 0) {
      problem("read of uninitialised global memory", doing, site, place());
    }
    if (write) cell = {block_number(), static_cast<int16_t>(thread.number), clock_of(thread.number), site};
  }
}

}  // namespace shrank::emulator
