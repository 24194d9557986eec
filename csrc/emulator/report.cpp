// What a kernel did wrong, in words, with the lines of its source.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "machine.h"

namespace shrank::emulator {
namespace {

constexpr std::size_t kMostProblems = 20;

struct Problem {
  std::string kind, doing, detail, other_did;
  Site site, other;
  std::string where;  // block and thread
};

std::vector<Problem> problems;

// "tile.cuh:88 from low_rank_linear.cuh:51": the lines of the kernel's own, from the inside out.
std::string described(const std::vector<std::string>& frames) {
  std::string text;
  for (const std::string& frame : frames) {
    if (frame.find("/arch/") != std::string::npos || frame.find("/emulator/") != std::string::npos) continue;
    text.append(text.empty() ? "" : " from ").append(frame.substr(frame.rfind('/') + 1));
  }
  return text.empty() ? "an unknown line" : text;
}

// Inlined frames of each site, innermost first, by binutils.
void look_up(const std::vector<Site>& sites, std::map<Site, std::string>& known) {
  Dl_info library{};
  if (sites.empty() || !dladdr(sites.front(), &library)) return;
  std::ostringstream command;
  command << "addr2line -a -i -e '" << library.dli_fname << "'";
  const auto* const base = static_cast<const char*>(library.dli_fbase);
  for (Site site : sites) command << " 0x" << std::hex << static_cast<const char*>(site) - base - 1;
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.str().c_str(), "r"), pclose);
  if (!pipe) throw std::runtime_error("the emulator needs addr2line (binutils) to name source lines");
  char buffer[1024];
  std::size_t next = 0;
  std::vector<std::string> frames;
  const auto finish = [&] {
    if (next > 0) known[sites[next - 1]] = described(frames);
    frames.clear();
  };
  while (std::fgets(buffer, sizeof buffer, pipe.get())) {
    std::string line(buffer, std::strcspn(buffer, "\n"));
    if (line.compare(0, 2, "0x") == 0) {
      finish();
      ++next;
    } else {
      frames.push_back(line.substr(0, line.find(" (discriminator")));
    }
  }
  finish();
}

std::string in_words(const Problem& p, std::map<Site, std::string>& lines) {
  std::string text = p.kind + " | kernel " + world.launch->kernel + " | " + p.doing;
  if (p.site) text += " at " + lines[p.site];
  text += " | " + p.where;
  if (!p.detail.empty()) text += " | " + p.detail;
  if (p.other) text += " | " + p.other_did + " at " + lines[p.other];
  return text;
}

}  // namespace

void clear_problems() { problems.clear(); }

void problem(const std::string& kind, const char* doing, Site site, const std::string& detail, Site other,
             const char* other_did) {
  const auto same = [&](const Problem& p) { return p.kind == kind && p.site == site && p.other == other; };
  if (problems.size() >= kMostProblems || std::any_of(problems.begin(), problems.end(), same)) return;
  std::string where = "block " + std::to_string(world.block.x) + "," + std::to_string(world.block.y);
  const Thread* const thread = world.blamed ? world.blamed : world.running;
  if (thread) where += " thread " + std::to_string(thread->number);
  problems.push_back({kind, doing, detail, other_did, site, other, where});
}

void fatal(const std::string& kind, const char* doing, Site site, const std::string& detail) {
  problem(kind, doing, site, detail);
  world.aborted = true;
  leave();
}

std::vector<std::string> take_problems() {
  static std::map<Site, std::string> lines;
  std::vector<Site> unknown;
  for (const Problem& p : problems)
    for (Site site : {p.site, p.other})
      if (site && !lines.count(site)) unknown.push_back(site);
  look_up(unknown, lines);
  std::vector<std::string> texts;
  for (const Problem& p : problems) texts.push_back(in_words(p, lines));
  problems.clear();
  return texts;
}

}  // namespace shrank::emulator
