-- Drops the next slice of the entries of dead slots, and buckets that are no longer needed.
--
-- A round takes the slots that are dead when it begins and visits the buckets in ascending order. A split
-- moves entries only to a new last bucket, which the round has still to visit; buckets are merged only
-- between rounds. So any number of sweepers may take turns at it. Every slot that no worker has is dropped
-- on the way, also one that nobody ever gave out.
--
-- KEYS[1]  directory of the pool
-- ARGV     most buckets to visit; fewer if they are full
-- Returns  number of dead slots that are not free yet

-- Both keep a call within a few milliseconds.
local MOST_ENTRIES = 512
local MOST_FENCED = 16

local budget = tonumber(ARGV[1])
local now = now_ms()
write_though_full()
purge(now)

local num_fenced = 0
for _, slot in ipairs(to_slots(read_set('members'))) do
  local expires, lease_ms = unpack_from('<dI4', read_row(slot))
  if num_fenced < MOST_FENCED and expires + (ABANDONED_AFTER_LEASES - 1) * lease_ms <= now then
    fence(slot, 'fenced', 'silent for ' .. ABANDONED_AFTER_LEASES .. ' leases')
    num_fenced = num_fenced + 1
  end
end
local members = read_set('members')

local directory = redis.call('HMGET', DIRECTORY, 'buckets', 'entries', 'cursor', 'sweeping', 'dead')
local num_buckets, num_entries = tonumber(directory[1]) or 1, tonumber(directory[2]) or 0
local cursor, sweeping, dead = tonumber(directory[3]) or 0, directory[4] or '', directory[5] or ''
if sweeping == '' then
  sweeping, dead, cursor = dead, '', 0
end

local kept_of = {}
local num_visited = 0

local function is_within_budget()
  return budget > 0 and num_visited < MOST_ENTRIES
end

local function count_bucket(flat)
  budget = budget - 1
  num_visited = num_visited + #flat / 2
end

local function sweep_bucket(bucket)
  local flat = redis.call('HGETALL', bucket_key(bucket))
  local kept, changed = {}, false
  for at = 1, #flat, 2 do
    local set = flat[at + 1]
    kept_of[set] = kept_of[set] or to_set(intersection(to_words(set), members))
    changed = changed or kept_of[set] ~= set
    if kept_of[set] ~= '' then
      kept[#kept + 1] = flat[at]
      kept[#kept + 1] = kept_of[set]
    end
  end
  if changed then
    write_bucket(bucket, kept)
    num_entries = num_entries - (#flat - #kept) / 2
  end
  count_bucket(flat)
end

local function merge_last()
  local last = num_buckets - 1
  local into = last - power_within(last)
  local flat = redis.call('HGETALL', bucket_key(last))
  if #flat > 0 then
    redis.call('HSET', bucket_key(into), unpack(flat))
    redis.call('DEL', bucket_key(last))
  end
  num_buckets = last
  count_bucket(flat)
end

if sweeping ~= '' then
  while cursor < num_buckets and is_within_budget() do
    sweep_bucket(cursor)
    cursor = cursor + 1
  end
  if cursor >= num_buckets then
    for _, slot in ipairs(to_slots(to_words(sweeping))) do
      note_event('swept', slot, '', '', '')
    end
    sweeping = ''
    if dead == '' and #to_slots(members) == 0 then
      num_entries = 0 -- whatever Redis may have lost of them
    end
  end
else
  local enough = ENTRIES_PER_BUCKET / 4
  while num_buckets > 1 and num_entries < enough * num_buckets and is_within_budget() do
    merge_last()
  end
end

redis.call('HSET', DIRECTORY, 'buckets', num_buckets, 'entries', num_entries, 'cursor', cursor,
  'sweeping', sweeping, 'dead', dead)
if sweeping == '' and dead == '' and #to_slots(members) == 0 then
  redis.call('EXPIRE', LOG, LOG_LEFT_S)
  redis.call('EXPIRE', REMOVALS, LOG_LEFT_S)
end
return #to_slots(to_words(dead)) + #to_slots(to_words(sweeping))
