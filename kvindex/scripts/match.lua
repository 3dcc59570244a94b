-- Finds how far each worker holds a prompt, and how loaded every worker is. Writes nothing.
--
-- Each slot's count is found by binary search for the end of its run, all slots together: a probe is
-- read once for all slots whose run may end there.
--
-- KEYS[1]  directory of the pool
-- ARGV     hashes to probe, 8 bytes each, in prompt order
-- Returns  {groups of slots whose runs end together (GROUP of keys.py, then a bitmap of 32-bit words);
--          what `fleet` returns}

local probes = ARGV[1]
local directory = redis.call('HMGET', DIRECTORY, 'buckets', 'members')
local num_buckets = tonumber(directory[1]) or 1
local power = power_within(num_buckets)
local words_of = {}
local groups = {}

local function holders(index)
  local hash = probes:sub(8 * index - 7, 8 * index)
  local set = redis.call('HGET', bucket_key(bucket_of(hash, num_buckets, power)), hash) or ''
  words_of[set] = words_of[set] or to_words(set)
  return words_of[set]
end

-- Those of `candidates` that are among `those`, and those that are not; nil where there are none.
local function divide(candidates, those)
  local inside, outside, any_inside, any_outside = {}, {}, 0, 0
  for index, word in ipairs(candidates) do
    inside[index] = band(word, those[index] or 0)
    outside[index] = bxor(word, inside[index])
    any_inside = bor(any_inside, inside[index])
    any_outside = bor(any_outside, outside[index])
  end
  return any_inside ~= 0 and inside or nil, any_outside ~= 0 and outside or nil
end

local function report(candidates, count)
  groups[#groups + 1] = pack('<I2I2', count, #candidates)
  for _, word in ipairs(candidates) do
    groups[#groups + 1] = pack('<I4', word % WORD)
  end
end

-- All candidates hold probe `low`, none holds probe `high`.
local function search(candidates, low, high)
  if high - low == 1 then
    return report(candidates, low)
  end
  local middle = floor((low + high) / 2)
  local inside, outside = divide(candidates, holders(middle))
  if inside then
    search(inside, middle, high)
  end
  if outside then
    search(outside, low, middle)
  end
end

local num_probes = #probes / 8
local members = to_words(directory[2] or '')
local started = num_probes > 0 and divide(members, holders(1))
if started then
  local whole, part = divide(started, holders(num_probes))
  if whole then
    report(whole, num_probes)
  end
  if part then
    search(part, 1, num_probes)
  end
end
return {table.concat(groups), fleet(now_ms())}
